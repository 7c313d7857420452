"""Backward, key side: ``dk`` and ``dv`` of a tile of keys, from the queries that see it.

Every program owns its keys, so nothing is added atomically and two runs agree bit for bit.
Compressed keys are seen by all later queries and selected blocks by an uneven number, so both are
cut into segments of queries whose float32 partial sums a last kernel adds in order.
"""

import triton
import triton.language as tl

from nsa.kernels.query_gradients import row_values
from nsa.kernels.tiles import find_range, locate_tile


@triton.jit
def _dkv_step(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_row,
    m_row,
    m_see,
    q_ptr,
    do_ptr,
    rows_ptr,
    num_rows,
    scale_log2,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
):
    """Adds query rows ``p_row`` to ``dk [BN, DKP]`` (not yet scaled) and ``dv [BN, DVP]``."""
    o_dk = tl.arange(0, DKP)
    o_dv = tl.arange(0, DVP)
    m_q = m_row[:, None] & (o_dk < DK)[None, :]
    m_do = m_row[:, None] & (o_dv < DV)[None, :]
    b_q = tl.load(q_ptr + p_row[:, None] * DK + o_dk[None, :], mask=m_q, other=0.0)
    b_do = tl.load(do_ptr + p_row[:, None] * DV + o_dv[None, :], mask=m_do, other=0.0)
    b_lse, b_delta, b_gate = row_values(rows_ptr, p_row, m_row, num_rows)
    b_p = tl.exp2(
        tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2 - b_lse[None, :]
    )  # [BN, BM]
    b_p = tl.where(m_see, b_p, 0.0)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_dv = tl.dot((b_p * b_gate[None, :]).to(b_do.dtype), b_do, b_dv, input_precision="ieee")
    b_ds = b_p * (b_dp * b_gate[None, :] - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def range_dkv_kernel(
    q_ptr,
    do_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_ptr,
    tile_offsets_ptr,
    num_seqs,
    num_rows,
    T_q,
    T_k,
    T_c,
    q_offset,
    scale_log2,
    scale,
    segment,
    part_dk,
    part_dv,
    H: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (key tiles, K, segments of queries): window keys or compressed keys.

    Window keys (``WINDOW > 0``) lie one per token.
    A tile holds ``BN`` keys, that is ``BN * STRIDE`` tokens (``STRIDE`` 1 for the window). Segment
    ``i`` writes its sums at ``i * part_dk`` and ``i * part_dv`` elements.
    """
    BQ: tl.constexpr = BM // GP
    i_k = tl.program_id(1)
    i_part = tl.program_id(2).to(tl.int64)
    s_0, k_token_0, q_0, c_0, n_k = locate_tile(
        tl.program_id(0),
        cu_seqlens_ptr,
        tile_offsets_ptr,
        num_seqs,
        T_k,
        T_q,
        T_c,
        BN * STRIDE,
        STRIDE,
        PACKED,
    )
    if s_0 >= n_k:
        return
    n_q = n_k if PACKED else T_q
    if WINDOW > 0:
        k_0 = k_token_0
        count = n_k
    else:
        k_0 = c_0
        count = tl.maximum(n_k - BLOCK + STRIDE, 0) // STRIDE
    o_n = s_0 // STRIDE + tl.arange(0, BN)
    m_n = (o_n < count)[:, None]
    o_dk = tl.arange(0, DKP)
    o_dv = tl.arange(0, DVP)
    p_k = ((k_0 + o_n) * K + i_k)[:, None] * DK + o_dk[None, :]
    p_v = ((k_0 + o_n) * K + i_k)[:, None] * DV + o_dv[None, :]
    m_k = m_n & (o_dk < DK)[None, :]
    m_v = m_n & (o_dv < DV)[None, :]
    b_k = tl.load(k_ptr + p_k, mask=m_k, other=0.0)
    b_v = tl.load(v_ptr + p_v, mask=m_v, other=0.0)
    b_dk = tl.zeros([BN, DKP], tl.float32)
    b_dv = tl.zeros([BN, DVP], tl.float32)
    o_m = tl.arange(0, BM)
    # Queries are counted from their own first row; position = q_offset + t.
    if WINDOW > 0:
        low = s_0
        high = tl.minimum(s_0 + BN - 1 + WINDOW, q_offset + n_q)
    else:
        low = s_0 + BLOCK - 1
        high = q_offset + n_q
    low = tl.maximum(tl.maximum(low - q_offset, 0), tl.program_id(2) * segment)
    high = tl.minimum(high - q_offset, (tl.program_id(2) + 1) * segment)
    low = low // BQ * BQ
    for t in range(low, high, BQ):
        o_t = t + o_m // GP
        o_g = o_m % GP
        m_row = (o_t < high) & (o_g < G)
        p_row = (q_0 + o_t) * H + i_k * G + o_g
        if WINDOW > 0:
            b_age = (q_offset + o_t)[None, :] - o_n[:, None]
            m_see = (b_age >= 0) & (b_age < WINDOW)
        else:
            m_see = (o_n * STRIDE + BLOCK - 1)[:, None] <= (q_offset + o_t)[None, :]
        b_dk, b_dv = _dkv_step(
            b_dk,
            b_dv,
            b_k,
            b_v,
            p_row,
            m_row,
            m_see & m_n,
            q_ptr,
            do_ptr,
            rows_ptr,
            num_rows,
            scale_log2,
            DK,
            DKP,
            DV,
            DVP,
        )
    tl.store(dk_ptr + i_part * part_dk + p_k, (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=m_k)
    tl.store(dv_ptr + i_part * part_dv + p_v, b_dv.to(dv_ptr.dtype.element_ty), mask=m_v)


@triton.jit
def selected_dkv_kernel(
    q_ptr,
    do_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    dk_ptr,
    dv_ptr,
    entries_ptr,
    entry_offsets_ptr,
    part_offsets_ptr,
    first_key_ptr,
    num_keys_ptr,
    first_query_ptr,
    num_lists,
    num_rows,
    q_offset,
    scale_log2,
    scale,
    segment,
    H: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SELECT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid (parts, SELECT / BN): a part is a segment of the queries of one (kv head, block).

    List ``i = kv head * blocks + block`` holds the query rows ``entries[entry_offsets[i] :
    entry_offsets[i + 1]]``, ascending, and the parts ``part_offsets[i] : part_offsets[i + 1]``.
    ``first_key``, ``num_keys``, ``first_query`` per block say where it lies. Sums go to ``dk, dv
    [parts, SELECT, D]``.
    """
    BQ: tl.constexpr = BM // GP
    i_part = tl.program_id(0)
    if i_part >= tl.load(part_offsets_ptr + num_lists):
        return
    i_list = find_range(part_offsets_ptr, num_lists, i_part)
    num_blocks = num_lists // K
    i_k = i_list // num_blocks
    i_block = i_list % num_blocks
    e_0 = (
        tl.load(entry_offsets_ptr + i_list)
        + (i_part - tl.load(part_offsets_ptr + i_list)) * segment
    )
    e_1 = tl.minimum(e_0 + segment, tl.load(entry_offsets_ptr + i_list + 1))
    key_0 = tl.load(first_key_ptr + i_block)
    query_0 = tl.load(first_query_ptr + i_block)
    num_keys = tl.load(num_keys_ptr + i_block)
    start = tl.load(first_key_ptr + num_blocks + i_block)  # position of the block in its sequence
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_n = (o_n < num_keys)[:, None]
    o_dk = tl.arange(0, DKP)
    o_dv = tl.arange(0, DVP)
    b_k = tl.load(
        k_ptr + ((key_0 + o_n) * K + i_k)[:, None] * DK + o_dk[None, :],
        mask=m_n & (o_dk < DK)[None, :],
        other=0.0,
    )
    b_v = tl.load(
        v_ptr + ((key_0 + o_n) * K + i_k)[:, None] * DV + o_dv[None, :],
        mask=m_n & (o_dv < DV)[None, :],
        other=0.0,
    )
    b_dk = tl.zeros([BN, DKP], tl.float32)
    b_dv = tl.zeros([BN, DVP], tl.float32)
    o_m = tl.arange(0, BM)
    o_g = o_m % GP
    for e in range(e_0, e_1, BQ):
        o_e = e + o_m // GP
        m_row = (o_e < e_1) & (o_g < G)
        i_query = tl.load(entries_ptr + o_e, mask=o_e < e_1, other=0).to(tl.int64)
        p_row = i_query * H + i_k * G + o_g
        position = q_offset + (i_query - query_0)
        m_see = ((start + o_n)[:, None] <= position[None, :]) & m_n
        b_dk, b_dv = _dkv_step(
            b_dk,
            b_dv,
            b_k,
            b_v,
            p_row,
            m_row,
            m_see,
            q_ptr,
            do_ptr,
            rows_ptr,
            num_rows,
            scale_log2,
            DK,
            DKP,
            DV,
            DVP,
        )
    p_part = (i_part.to(tl.int64) * SELECT + o_n)[:, None]
    tl.store(dk_ptr + p_part * DK + o_dk[None, :], b_dk * scale, mask=m_n & (o_dk < DK)[None, :])
    tl.store(dv_ptr + p_part * DV + o_dv[None, :], b_dv, mask=m_n & (o_dv < DV)[None, :])


@triton.jit
def sum_parts_kernel(
    parts_k_ptr,
    parts_v_ptr,
    dk_ptr,
    dv_ptr,
    part_offsets_ptr,
    first_key_ptr,
    num_keys_ptr,
    num_blocks,
    SUMS: tl.constexpr,
    K: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DKP: tl.constexpr,
    DVP: tl.constexpr,
    SELECT: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid (blocks, K, SELECT / BN).

    Adds the parts of a block in order, ``SUMS`` of them each, and writes its keys' gradients.
    """
    i_block = tl.program_id(0)
    i_k = tl.program_id(1)
    i_list = i_k * num_blocks + i_block
    o_n = tl.program_id(2) * BN + tl.arange(0, BN)
    row = (tl.load(first_key_ptr + i_block) + o_n) * K + i_k
    m_n = o_n < tl.load(num_keys_ptr + i_block)
    first = tl.load(part_offsets_ptr + i_list) * SUMS
    last = tl.load(part_offsets_ptr + i_list + 1) * SUMS
    _sum_parts(parts_k_ptr, dk_ptr, first, last, o_n, row, m_n, DK, DKP, SELECT, BN)
    _sum_parts(parts_v_ptr, dv_ptr, first, last, o_n, row, m_n, DV, DVP, SELECT, BN)


@triton.jit
def _sum_parts(
    parts_ptr,
    out_ptr,
    first,
    last,
    o_n,
    row,
    m_n,
    D: tl.constexpr,
    DP: tl.constexpr,
    SELECT: tl.constexpr,
    BN: tl.constexpr,
):
    o_d = tl.arange(0, DP)
    m_out = m_n[:, None] & (o_d < D)[None, :]
    b_sum = tl.zeros([BN, DP], tl.float32)
    for part in range(first, last):
        p_part = (part * SELECT + o_n.to(tl.int64))[:, None] * D + o_d[None, :]
        b_sum += tl.load(parts_ptr + p_part, mask=m_out, other=0.0)
    p_out = out_ptr + row[:, None] * D + o_d[None, :]
    tl.store(p_out, b_sum.to(out_ptr.dtype.element_ty), mask=m_out)
