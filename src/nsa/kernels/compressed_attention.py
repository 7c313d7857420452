"""Attention to compressed blocks: forward."""

import triton
import triton.language as tl

from nsa.kernels.tiles import locate_tile, num_visible, query_rows, softmax_step


@triton.jit(do_not_specialize=["num_seqs", "T_q", "T_c", "q_offset"])
def compressed_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    num_seqs,
    T_q,
    T_c,
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
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (query tiles, K). ``o [T, H, DV]``, ``lse [T, H]`` natural log."""
    BQ: tl.constexpr = BM // GP
    i_k = tl.program_id(1)
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest tiles first
    t_0, q_0, _, c_0, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, num_seqs, T_q, T_q, T_c, BQ, STRIDE, PACKED
    )
    if t_0 >= n_q:
        return
    o_t, p_row, m_row = query_rows(t_0, q_0, n_q, i_k, H, G, GP, BM)
    o_dk = tl.arange(0, DKP)
    o_dv = tl.arange(0, DVP)
    m_dk = o_dk < DK
    m_dv = o_dv < DV
    # [BM, DKP]
    b_q = tl.load(
        q_ptr + p_row[:, None] * DK + o_dk[None, :], mask=m_row[:, None] & m_dk[None, :], other=0.0
    )
    b_visible = num_visible(q_offset + o_t, BLOCK, STRIDE)
    n_all = num_visible(q_offset + t_0, BLOCK, STRIDE)
    n_any = num_visible(q_offset + tl.minimum(t_0 + BQ, n_q) - 1, BLOCK, STRIDE)

    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, DVP], tl.float32)
    o_n = tl.arange(0, BN)
    p_k = k_ptr + (o_n * K + i_k)[None, :] * DK + o_dk[:, None]
    p_v = v_ptr + (o_n * K + i_k)[:, None] * DV + o_dv[None, :]
    n_full = n_all // BN * BN
    for c in range(0, n_full, BN):
        b_k = tl.load(p_k + (c_0 + c) * K * DK, mask=m_dk[:, None], other=0.0)
        b_v = tl.load(p_v + (c_0 + c) * K * DV, mask=m_dv[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_m_new[:, None])
        b_alpha = tl.exp2(b_m - b_m_new)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision="ieee")
        b_m = b_m_new
    for c in range(n_full, n_any, BN):
        m_n = c + o_n < n_any
        b_k = tl.load(p_k + (c_0 + c) * K * DK, mask=m_dk[:, None] & m_n[None, :], other=0.0)
        b_v = tl.load(p_v + (c_0 + c) * K * DV, mask=m_n[:, None] & m_dv[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale_log2
        b_s = tl.where((c + o_n)[None, :] < b_visible[:, None], b_s, float("-inf"))
        b_p, b_m, b_l, b_acc = softmax_step(b_s, b_m, b_l, b_acc)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    b_o = b_acc / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    p_o = o_ptr + p_row[:, None] * DV + o_dv[None, :]
    tl.store(p_o, b_o.to(o_ptr.dtype.element_ty), mask=m_row[:, None] & m_dv[None, :])
    tl.store(lse_ptr + p_row, (b_m + tl.log2(b_l)) * 0.6931471805599453, mask=m_row)
