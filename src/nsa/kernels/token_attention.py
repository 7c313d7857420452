"""Attention to tokens, selected blocks and window, alone or fused with the gated sum: forward."""

import triton
import triton.language as tl

from nsa.kernels.tiles import chosen_block, locate_tile, opaque, query_rows, softmax_step


@triton.jit
def token_attention_fwd_kernel(
    q_ptr,
    k_slc_ptr,
    v_slc_ptr,
    k_win_ptr,
    v_win_ptr,
    gates_ptr,
    o_cmp_ptr,
    o_ptr,
    o_slc_ptr,
    o_win_ptr,
    lse_slc_ptr,
    lse_win_ptr,
    blocks_ptr,
    bits_ptr,
    counts_ptr,
    cu_seqlens_ptr,
    num_seqs,
    T_q,
    T_k,
    q_offset,
    scale_log2,
    H: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SELECT: tl.constexpr,
    WINDOW: tl.constexpr,
    U: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SLC: tl.constexpr,
    ALL: tl.constexpr,
    WIN: tl.constexpr,
    COMBINE: tl.constexpr,
    SAVE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (query tiles, K).

    ``SLC`` and ``WIN`` switch the branches on; ``ALL`` selects every block instead of the lists;
    ``COMBINE`` writes the gated sum ``o`` with ``o_cmp``; ``SAVE`` writes each branch's output and
    lse.
    """
    BQ: tl.constexpr = BM // GP
    i_k = tl.program_id(1)
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    t_0, q_0, k_0, _, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, num_seqs, T_q, T_k, 0, BQ, 1, PACKED
    )
    if t_0 >= n_q:
        return
    o_q = tl.arange(0, BM) // GP
    o_t, p_row, m_row = query_rows(t_0, q_0, n_q, i_k, H, G, GP, BM)
    o_dk = tl.arange(0, DKP)
    o_dv = tl.arange(0, DVP)
    m_dk = o_dk < DK
    m_dv = o_dv < DV
    m_o = m_row[:, None] & m_dv[None, :]
    p_o = p_row[:, None] * DV + o_dv[None, :]
    b_q = tl.load(
        q_ptr + p_row[:, None] * DK + o_dk[None, :], mask=m_row[:, None] & m_dk[None, :], other=0.0
    )
    position = q_offset + o_t
    last = q_offset + tl.minimum(t_0 + BQ, n_q) - 1
    o_n = tl.arange(0, BN)
    o_k = (o_n * K + i_k)[None, :] * DK + o_dk[:, None]  # [DKP, BN]
    o_v = (o_n * K + i_k)[:, None] * DV + o_dv[None, :]  # [BN, DVP]

    if SLC:
        p_tile = (i_tile * K + i_k).to(tl.int64)
        count = last // SELECT + 1 if ALL else tl.load(counts_ptr + p_tile)
        b_m = tl.full([BM], float("-inf"), tl.float32)
        b_l = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, DVP], tl.float32)
        PARTS: tl.constexpr = (SELECT + BN - 1) // BN
        for i in range(0, count * PARTS):
            part = (i % PARTS) * BN
            if ALL:
                s = i // PARTS * SELECT + part
                limit = position
            else:
                block, limit = chosen_block(
                    blocks_ptr, bits_ptr, p_tile, i // PARTS, position, o_q, U
                )
                s = block * SELECT + part
            m_n = s + o_n <= last
            if SELECT % BN:
                m_n &= part + o_n < SELECT
            b_k = tl.load(
                k_slc_ptr + o_k + (k_0 + s) * K * DK, mask=m_dk[:, None] & m_n[None, :], other=0.0
            )
            b_v = tl.load(
                v_slc_ptr + o_v + (k_0 + s) * K * DV, mask=m_n[:, None] & m_dv[None, :], other=0.0
            )
            m_see = (s + o_n)[None, :] <= limit[:, None]
            if SELECT % BN:
                m_see &= m_n[None, :]
            b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2
            b_s = tl.where(m_see, b_s, float("-inf"))
            b_p, b_m, b_l, b_acc = softmax_step(b_s, b_m, b_l, b_acc)
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_o = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
        if SAVE:
            tl.store(o_slc_ptr + p_o, b_o.to(o_slc_ptr.dtype.element_ty), mask=m_o)
            tl.store(lse_slc_ptr + p_row, (b_m + tl.log2(b_l)) * 0.6931471805599453, mask=m_row)
        elif COMBINE:
            # Kept in memory while the window runs: in registers it would halve the occupancy.
            tl.store(o_ptr + p_o, b_o.to(o_ptr.dtype.element_ty), mask=m_o)

    if WIN:
        b_m = tl.full([BM], float("-inf"), tl.float32)
        b_l = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, DVP], tl.float32)
        first = tl.maximum(q_offset + t_0 - WINDOW + 1, 0)
        for s in range(first, last + 1, BN):
            m_n = s + o_n <= last
            b_k = tl.load(
                k_win_ptr + o_k + (k_0 + s) * K * DK, mask=m_dk[:, None] & m_n[None, :], other=0.0
            )
            b_v = tl.load(
                v_win_ptr + o_v + (k_0 + s) * K * DV, mask=m_n[:, None] & m_dv[None, :], other=0.0
            )
            b_age = position[:, None] - (s + o_n)[None, :]
            b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2
            b_s = tl.where((b_age >= 0) & (b_age < WINDOW), b_s, float("-inf"))
            b_p, b_m, b_l, b_acc = softmax_step(b_s, b_m, b_l, b_acc)
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_o = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
        _, p_row, m_row = query_rows(opaque(t_0, 1), q_0, n_q, i_k, H, G, GP, BM)
        m_o = m_row[:, None] & m_dv[None, :]
        p_o = p_row[:, None] * DV + o_dv[None, :]
        if SAVE:
            tl.store(o_win_ptr + p_o, b_o.to(o_win_ptr.dtype.element_ty), mask=m_o)
            tl.store(lse_win_ptr + p_row, (b_m + tl.log2(b_l)) * 0.6931471805599453, mask=m_row)
        if COMBINE:
            p_slc = o_slc_ptr if SAVE else o_ptr
            tl.debug_barrier()  # The store above is read back, perhaps by other threads.
            b_o *= tl.load(gates_ptr + p_row * 3 + 2, mask=m_row, other=0.0).to(tl.float32)[:, None]
            b_g = tl.load(gates_ptr + p_row * 3, mask=m_row, other=0.0).to(tl.float32)
            b_o += b_g[:, None] * tl.load(o_cmp_ptr + p_o, mask=m_o, other=0.0).to(tl.float32)
            b_g = tl.load(gates_ptr + p_row * 3 + 1, mask=m_row, other=0.0).to(tl.float32)
            b_o += b_g[:, None] * tl.load(p_slc + p_o, mask=m_o, other=0.0).to(tl.float32)
            tl.store(o_ptr + p_o, b_o.to(o_ptr.dtype.element_ty), mask=m_o)
