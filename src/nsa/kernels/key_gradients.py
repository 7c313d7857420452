"""Backward, key side: ``dk`` and ``dv`` of a tile of keys, from the queries that see it.

Every program owns its keys, so nothing is added atomically and two runs agree bit for bit.
Compressed keys are seen by all later queries and selected blocks by an uneven number, so both are
cut into segments of queries whose float32 partial sums are added in order. So are tiles of window
keys where they are few.
"""

import triton
import triton.language as tl

from nsa.kernels.query_gradients import row_values
from nsa.kernels.tiles import find_numbered, first_number, locate_tile, num_visible, opaque


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
    """Adds query rows ``p_row`` to ``dk [BN, DKP]`` (not yet scaled) and ``dv [BN, DVP]``.

    Sums of keys that do not exist are never stored, whatever ``m_see`` says of them.
    """
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
def _key_places(
    n_0,
    k_0,
    count,
    i_k,
    K: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BN: tl.constexpr,
):
    """Of a tile of keys from ``n_0``: their numbers, and where keys and values lie."""
    o_n = n_0 + tl.arange(0, BN)
    m_n = (o_n < count)[:, None]
    o_dk = tl.arange(0, DKP)
    o_dv = tl.arange(0, DVP)
    row = ((k_0 + o_n) * K + i_k)[:, None]
    m_k = m_n & (o_dk < DK)[None, :]
    m_v = m_n & (o_dv < DV)[None, :]
    return o_n, row * DK + o_dk[None, :], m_k, row * DV + o_dv[None, :], m_v


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
        num_seqs,
        T_k,
        T_q,
        T_c,
        BN * STRIDE,
        STRIDE,
        PACKED,
    )
    n_q = n_k if PACKED else T_q
    # Queries are counted from their own first row; position = q_offset + t.
    if WINDOW > 0:
        low = s_0
        high = tl.minimum(s_0 + BN - 1 + WINDOW, q_offset + n_q)
    else:
        low = s_0 + BLOCK - 1
        high = q_offset + n_q
    # Of the queries that see the tile, a segment.
    low = tl.maximum(low - q_offset, 0) + tl.program_id(2) * segment
    high = tl.minimum(high - q_offset, low + segment)
    nothing = s_0 >= n_k
    if PACKED:  # Short sequences have few segments; the sums of others are zeros as they are.
        nothing = nothing | (low >= high)
    if nothing:
        return
    if WINDOW > 0:
        k_0 = k_token_0
        count = n_k
    else:
        k_0 = c_0
        count = tl.maximum(n_k - BLOCK + STRIDE, 0) // STRIDE
    n_0 = s_0 // STRIDE
    o_n, p_k, m_k, p_v, m_v = _key_places(n_0, k_0, count, i_k, K, DK, DKP, DV, DVP, BN)
    b_k = tl.load(k_ptr + p_k, mask=m_k, other=0.0)
    b_v = tl.load(v_ptr + p_v, mask=m_v, other=0.0)
    b_dk = tl.zeros([BN, DKP], tl.float32)
    b_dv = tl.zeros([BN, DVP], tl.float32)
    o_m = tl.arange(0, BM)
    o_q = o_m // GP
    o_g = o_m % GP
    for t in range(low, high, BQ):
        o_t = t + o_q
        m_row = (o_t < high) & (o_g < G)
        p_row = (q_0 + t) * H + i_k * G + (o_q * H + o_g)
        position = q_offset + o_t
        if WINDOW > 0:
            m_see = o_n[:, None] <= position[None, :]
            m_see &= o_n[:, None] > (position - WINDOW)[None, :]
        else:
            m_see = o_n[:, None] < num_visible(position, BLOCK, STRIDE)[None, :]
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
    n_0 = opaque(n_0)
    _, p_k, m_k, p_v, m_v = _key_places(n_0, k_0, count, i_k, K, DK, DKP, DV, DVP, BN)
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
    cu_seqlens_ptr,
    num_seqs,
    num_lists,
    num_rows,
    q_offset,
    scale_log2,
    scale,
    segment,
    T_q,
    T_k,
    H: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SELECT: tl.constexpr,
    PACKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid (parts, SELECT / BN): a part is a segment of the queries of one (kv head, block).

    List ``i = kv head * blocks + block`` holds the query rows ``entries[entry_offsets[i] :
    entry_offsets[i + 1]]``, ascending. Its parts are numbered as by ``first_number``, and so are
    blocks; sums go to ``dk, dv [parts, SELECT, D]``.
    """
    BQ: tl.constexpr = BM // GP
    i_part = tl.program_id(0)
    i_list = find_numbered(entry_offsets_ptr, num_lists, i_part, segment)
    i_segment = i_part - first_number(entry_offsets_ptr, i_list, segment)
    e_0 = tl.load(entry_offsets_ptr + i_list) + i_segment * segment
    e_1 = tl.minimum(e_0 + segment, tl.load(entry_offsets_ptr + i_list + 1))
    if e_0 >= e_1:
        return
    num_blocks = num_lists // K
    i_k = i_list // num_blocks
    start, token_0, query_0, _, n_k = locate_tile(
        i_list % num_blocks, cu_seqlens_ptr, num_seqs, T_k, T_q, 0, SELECT, 1, PACKED
    )
    key_0 = token_0 + start
    count = tl.minimum(n_k - start, SELECT)
    n_0 = tl.program_id(1) * BN
    o_n, p_k, m_k, p_v, m_v = _key_places(n_0, key_0, count, i_k, K, DK, DKP, DV, DVP, BN)
    b_k = tl.load(k_ptr + p_k, mask=m_k, other=0.0)
    b_v = tl.load(v_ptr + p_v, mask=m_v, other=0.0)
    b_dk = tl.zeros([BN, DKP], tl.float32)
    b_dv = tl.zeros([BN, DVP], tl.float32)
    o_m = tl.arange(0, BM)
    o_g = o_m % GP
    for e in range(e_0, e_1, BQ):
        o_e = e + o_m // GP
        m_row = (o_e < e_1) & (o_g < G)
        i_query = tl.load(entries_ptr + o_e, mask=o_e < e_1, other=0).to(tl.int64)
        p_row = i_query * H + i_k * G + o_g
        position = (i_query - query_0) + (q_offset - start)  # Counted from the block's first key.
        m_see = o_n[:, None] <= position[None, :]
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
    n_0, part = opaque(n_0), i_part.to(tl.int64) * SELECT
    _, p_k, m_k, p_v, m_v = _key_places(n_0, part, count, 0, 1, DK, DKP, DV, DVP, BN)
    tl.store(dk_ptr + p_k, b_dk * scale, mask=m_k)
    tl.store(dv_ptr + p_v, b_dv, mask=m_v)


@triton.jit(do_not_specialize=["num_seqs", "num_blocks", "T_q", "T_k"])
def list_numbers_kernel(
    indices_ptr,
    numbers_ptr,
    cu_seqlens_ptr,
    num_seqs,
    num_blocks,
    T_q,
    T_k,
    K: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    SELECT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (tiles of SELECT queries, K): the list of each entry ``[tokens, K, N]`` of the choice.

    That is ``kv head * num_blocks + block``, blocks of all sequences numbered through; unused
    entries, and blocks behind the last of their sequence, belong behind all lists.
    """
    i_tile = tl.program_id(0)
    i_k = tl.program_id(1)
    t_0, q_0, _, _, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, num_seqs, T_q, T_q, 0, SELECT, 1, PACKED
    )
    if t_0 >= n_q:
        return
    if PACKED:  # Blocks are tiles of the sequence's own tokens.
        first = i_tile - t_0 // SELECT
        n_block = tl.cdiv(n_q, SELECT)
    else:
        n_block = tl.cdiv(T_k, SELECT)
        first = i_tile // tl.cdiv(T_q, SELECT) * n_block
    o_e = tl.arange(0, E)
    o_t = o_e // N
    m_e = (o_t < SELECT) & (t_0 + o_t < n_q)
    p_e = ((q_0 + t_0 + o_t) * K + i_k) * N + o_e % N
    b_block = tl.load(indices_ptr + p_e, mask=m_e, other=-1)
    m_used = (b_block >= 0) & (b_block < n_block)
    b_number = tl.where(m_used, i_k * num_blocks + first + b_block, K * num_blocks)
    tl.store(numbers_ptr + p_e, b_number, mask=m_e)
