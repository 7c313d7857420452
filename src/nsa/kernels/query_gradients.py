"""Backward, query side: what each query row needs, gradients of the gates, then ``dq``.

With ``dp = do v^T`` and ``delta = sum(do * o)`` of a branch, the gradient of its logits is ``p * (g
* (dp - delta) + dlse)``, where ``g`` is the branch's gate (1 for a branch alone).
"""

import triton
import triton.language as tl

from nsa.kernels.tiles import chosen_block, locate_tile, num_visible, opaque, query_rows


@triton.jit
def row_values_kernel(
    do_ptr,
    o_cmp_ptr,
    o_slc_ptr,
    o_win_ptr,
    lse_cmp_ptr,
    lse_slc_ptr,
    lse_win_ptr,
    gates_ptr,
    dlse_ptr,
    rows_ptr,
    dgates_ptr,
    num_rows,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    CMP: tl.constexpr,
    SLC: tl.constexpr,
    WIN: tl.constexpr,
    GATED: tl.constexpr,
    DLSE: tl.constexpr,
    R: tl.constexpr,
):
    """Grid (rows / R): ``rows [3 branches, 3, num_rows]`` fp32 and ``dgates [num_rows, 3]``.

    The values are the base-2 lse (inf where nothing is visible, so that p = 0), ``delta = g *
    sum(do * o_branch) - dlse``, and the gate.
    """
    p_row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    o_dv = tl.arange(0, DVP)
    m_row = p_row < num_rows
    m = m_row[:, None] & (o_dv < DV)[None, :]
    p = p_row[:, None] * DV + o_dv[None, :]
    b_do = tl.load(do_ptr + p, mask=m, other=0.0).to(tl.float32)
    for i in tl.static_range(3):
        if (CMP and i == 0) or (SLC and i == 1) or (WIN and i == 2):
            p_o = o_cmp_ptr if i == 0 else (o_slc_ptr if i == 1 else o_win_ptr)
            p_lse = lse_cmp_ptr if i == 0 else (lse_slc_ptr if i == 1 else lse_win_ptr)
            b_delta = tl.sum(b_do * tl.load(p_o + p, mask=m, other=0.0).to(tl.float32), 1)
            if GATED:
                b_gate = tl.load(gates_ptr + p_row * 3 + i, mask=m_row, other=0.0).to(tl.float32)
                p_dgate = dgates_ptr + p_row * 3 + i
                tl.store(p_dgate, b_delta.to(dgates_ptr.dtype.element_ty), mask=m_row)
                b_delta *= b_gate
            else:
                b_gate = tl.full([R], 1.0, tl.float32)
            if DLSE:
                b_delta -= tl.load(dlse_ptr + p_row, mask=m_row, other=0.0)
            b_lse = tl.load(p_lse + p_row, mask=m_row, other=0.0) * 1.4426950408889634
            b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
            p_out = rows_ptr + i * 3 * tl.cast(num_rows, tl.int64) + p_row
            tl.store(p_out, b_lse, mask=m_row)
            tl.store(p_out + num_rows, b_delta, mask=m_row)
            tl.store(p_out + 2 * tl.cast(num_rows, tl.int64), b_gate, mask=m_row)


@triton.jit
def row_values(rows_ptr, p_row, m_row, num_rows):
    """Base-2 lse, delta and gate of rows of one branch; rows that do not exist have p = 0."""
    b_lse = tl.load(rows_ptr + p_row, mask=m_row, other=float("inf"))
    b_delta = tl.load(rows_ptr + (p_row + num_rows), mask=m_row, other=0.0)
    b_gate = tl.load(rows_ptr + 2 * tl.cast(num_rows, tl.int64) + p_row, mask=m_row, other=0.0)
    return b_lse, b_delta, b_gate


@triton.jit
def _dq_step(b_dq, b_q, b_do, b_k, b_v, m_see, b_lse, b_delta, b_gate, scale_log2):
    """Adds a tile of keys ``b_k [BN, DKP]``, ``b_v [BN, DVP]`` to ``dq``, not yet scaled."""
    b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2 - b_lse[:, None])
    b_p = tl.where(m_see, b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = b_p * (b_dp * b_gate[:, None] - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit
def dq_kernel(
    q_ptr,
    do_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    k_slc_ptr,
    v_slc_ptr,
    k_win_ptr,
    v_win_ptr,
    rows_ptr,
    dq_ptr,
    blocks_ptr,
    bits_ptr,
    counts_ptr,
    cu_seqlens_ptr,
    num_seqs,
    num_rows,
    T_q,
    T_k,
    T_c,
    q_offset,
    scale_log2,
    scale,
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
    SELECT: tl.constexpr,
    WINDOW: tl.constexpr,
    U: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
    CMP: tl.constexpr,
    SLC: tl.constexpr,
    ALL: tl.constexpr,
    WIN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (query tiles, K). ``dq`` of the branches switched on, summed in float32."""
    BQ: tl.constexpr = BM // GP
    i_k = tl.program_id(1)
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    t_0, q_0, k_0, c_0, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, num_seqs, T_q, T_k, T_c, BQ, STRIDE, PACKED
    )
    if t_0 >= n_q:
        return
    o_q = tl.arange(0, BM) // GP
    o_t, p_row, m_row = query_rows(t_0, q_0, n_q, i_k, H, G, GP, BM)
    o_dk = tl.arange(0, DKP)
    o_dv = tl.arange(0, DVP)
    m_dk = (o_dk < DK)[None, :]
    m_dv = (o_dv < DV)[None, :]
    b_q = tl.load(
        q_ptr + p_row[:, None] * DK + o_dk[None, :], mask=m_row[:, None] & m_dk, other=0.0
    )
    b_do = tl.load(
        do_ptr + p_row[:, None] * DV + o_dv[None, :], mask=m_row[:, None] & m_dv, other=0.0
    )
    position = q_offset + o_t
    last = q_offset + tl.minimum(t_0 + BQ, n_q) - 1
    b_dq = tl.zeros([BM, DKP], tl.float32)

    if CMP:
        b_lse, b_delta, b_gate = row_values(rows_ptr, p_row, m_row, num_rows)
        b_visible = num_visible(position, BLOCK, STRIDE)
        n_any = num_visible(last, BLOCK, STRIDE)
        o_n = tl.arange(0, BN)
        o_k = (o_n * K + i_k)[:, None] * DK + o_dk[None, :]
        o_v = (o_n * K + i_k)[:, None] * DV + o_dv[None, :]
        for c in range(0, n_any, BN):
            m_n = (c + o_n < n_any)[:, None]
            b_k = tl.load(k_cmp_ptr + o_k + (c_0 + c) * K * DK, mask=m_n & m_dk, other=0.0)
            b_v = tl.load(v_cmp_ptr + o_v + (c_0 + c) * K * DV, mask=m_n & m_dv, other=0.0)
            m_see = (c + o_n)[None, :] < b_visible[:, None]
            b_dq = _dq_step(b_dq, b_q, b_do, b_k, b_v, m_see, b_lse, b_delta, b_gate, scale_log2)

    if SLC:
        b_lse, b_delta, b_gate = row_values(
            rows_ptr + 3 * tl.cast(num_rows, tl.int64), p_row, m_row, num_rows
        )
        p_tile = (i_tile * K + i_k).to(tl.int64)
        count = last // SELECT + 1 if ALL else tl.load(counts_ptr + p_tile)
        PARTS: tl.constexpr = (SELECT + BS - 1) // BS
        o_s = tl.arange(0, BS)
        o_k = (o_s * K + i_k)[:, None] * DK + o_dk[None, :]
        o_v = (o_s * K + i_k)[:, None] * DV + o_dv[None, :]
        for i in range(0, count * PARTS):
            part = (i % PARTS) * BS
            if ALL:
                s = i // PARTS * SELECT + part
                limit = position
            else:
                block, limit = chosen_block(
                    blocks_ptr, bits_ptr, p_tile, i // PARTS, position, o_q, U
                )
                s = block * SELECT + part
            m_n = (s + o_s <= last)[:, None]
            m_see = (s + o_s)[None, :] <= limit[:, None]
            if SELECT % BS:
                m_n &= (part + o_s < SELECT)[:, None]
                m_see &= (part + o_s < SELECT)[None, :]
            b_k = tl.load(k_slc_ptr + o_k + (k_0 + s) * K * DK, mask=m_n & m_dk, other=0.0)
            b_v = tl.load(v_slc_ptr + o_v + (k_0 + s) * K * DV, mask=m_n & m_dv, other=0.0)
            b_dq = _dq_step(b_dq, b_q, b_do, b_k, b_v, m_see, b_lse, b_delta, b_gate, scale_log2)

    if WIN:
        b_lse, b_delta, b_gate = row_values(
            rows_ptr + 6 * tl.cast(num_rows, tl.int64), p_row, m_row, num_rows
        )
        o_n = tl.arange(0, BN)
        o_k = (o_n * K + i_k)[:, None] * DK + o_dk[None, :]
        o_v = (o_n * K + i_k)[:, None] * DV + o_dv[None, :]
        first = tl.maximum(q_offset + t_0 - WINDOW + 1, 0)
        for s in range(first, last + 1, BN):
            m_n = (s + o_n <= last)[:, None]
            b_k = tl.load(k_win_ptr + o_k + (k_0 + s) * K * DK, mask=m_n & m_dk, other=0.0)
            b_v = tl.load(v_win_ptr + o_v + (k_0 + s) * K * DV, mask=m_n & m_dv, other=0.0)
            b_age = position[:, None] - (s + o_n)[None, :]
            m_see = (b_age >= 0) & (b_age < WINDOW)
            b_dq = _dq_step(b_dq, b_q, b_do, b_k, b_v, m_see, b_lse, b_delta, b_gate, scale_log2)

    _, p_row, m_row = query_rows(opaque(t_0), q_0, n_q, i_k, H, G, GP, BM)
    p_dq = dq_ptr + p_row[:, None] * DK + o_dk[None, :]
    tl.store(p_dq, (b_dq * scale).to(dq_ptr.dtype.element_ty), mask=m_row[:, None] & m_dk)
