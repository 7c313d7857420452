"""Compression by a softmax over each block for every channel, forward and backward (eq. 7).

Spans and the table that locates them, rows and the legend: ``nsa.kernels.compress_kv``.
"""

import triton
import triton.language as tl

from nsa.kernels.compress_kv import locate
from nsa.kernels.tiles import num_visible


@triton.jit(do_not_specialize=["num", "T", "per_seq"])
def gated_fwd_kernel(
    x_ptr,
    pe_ptr,
    w1_ptr,
    bias_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    num,
    T,
    per_seq,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Grid (blocks / BM, K, D / BC): ``out [num, K, D]``.

    ``bias [K, BLOCK, D]`` is ``W1 pe``, fp32. ``SAVE`` writes ``lse`` like ``out``, fp32: that of
    each channel's softmax over the block.
    """
    i_k = tl.program_id(1)
    o_i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_c = tl.program_id(2) * BC + tl.arange(0, BC)
    o_d = tl.arange(0, DP)
    m_i = (o_i < num)[:, None]
    m_c = o_c < D
    m_d = o_d < D
    first, _, _ = locate(o_i, table_ptr, num, T, per_seq, BLOCK, STRIDE, PACKED)
    m_row = (first >= 0)[:, None]
    b_w = tl.load(
        w1_ptr + o_c[None, :] * D + o_d[:, None], mask=m_d[:, None] & m_c[None, :], other=0.0
    )
    p_x = x_ptr + (first * K + i_k)[:, None] * D
    p_pe = i_k * BLOCK * D + o_c
    b_m = tl.full([BM, BC], float("-inf"), tl.float32)
    b_l = tl.zeros([BM, BC], tl.float32)
    b_acc = tl.zeros([BM, BC], tl.float32)
    for s in range(BLOCK):
        b_x = tl.load(p_x + (s * K * D + o_d)[None, :], mask=m_row & m_d[None, :], other=0.0)
        b_u = tl.load(p_x + (s * K * D + o_c)[None, :], mask=m_row & m_c[None, :], other=0.0)
        b_pe = tl.load(pe_ptr + p_pe + s * D, mask=m_c, other=0.0).to(tl.float32)
        b_u = b_u.to(tl.float32) + b_pe[None, :]
        b_bias = tl.load(bias_ptr + p_pe + s * D, mask=m_c, other=0.0)
        b_z = tl.dot(b_x, b_w, input_precision="ieee") + b_bias[None, :]
        b_m_new = tl.maximum(b_m, b_z)
        b_p = tl.exp(b_z - b_m_new)
        b_alpha = tl.exp(b_m - b_m_new)
        b_l = b_l * b_alpha + b_p
        b_acc = b_acc * b_alpha + b_p * b_u
        b_m = b_m_new
    p_out = (o_i * K + i_k)[:, None] * D + o_c[None, :]
    m_out = m_i & m_c[None, :]
    b_out = tl.where(m_row, b_acc / b_l, 0.0)
    tl.store(out_ptr + p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_out)
    if SAVE:
        tl.store(lse_ptr + p_out, b_m + tl.log(b_l), mask=m_out)


@triton.jit(do_not_specialize=["num", "T", "per_seq", "gap"])
def gated_bwd_kernel(
    x_ptr,
    pe_ptr,
    w1_ptr,
    bias_ptr,
    dout_ptr,
    out_ptr,
    lse_ptr,
    table_ptr,
    direct_ptr,
    dlogits_ptr,
    parts_ptr,
    num,
    T,
    per_seq,
    gap,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Grid (pieces / BM, K, STRIDE * D / BC): the two gradients of every token.

    ``direct`` (fp32) comes through the weighted sum and ``dlogits`` through the softmax, each added
    over the blocks that hold the token. ``parts [pieces / BM, 2, K, BLOCK, D]`` (fp32) holds their
    sums over pieces for each place in the block, which the gradient of the positions needs. ``out``
    and ``lse`` are those of the forward, fp32.
    """
    R: tl.constexpr = BLOCK // STRIDE
    TILES: tl.constexpr = (D + BC - 1) // BC
    i_tile = tl.program_id(0).to(tl.int64)
    i_k = tl.program_id(1)
    s = tl.program_id(2) // TILES
    piece = i_tile * BM + tl.arange(0, BM)
    o_c = tl.program_id(2) % TILES * BC + tl.arange(0, BC)
    o_d = tl.arange(0, DP)
    m_c = o_c < D
    m_d = o_d < D
    first, index, left = locate(piece, table_ptr, num, T, per_seq, STRIDE, STRIDE, PACKED)
    count = num_visible(index * STRIDE + left - 1, BLOCK, STRIDE)
    index = tl.where(first >= 0, index, -1)
    m_row = (first >= 0)[:, None]
    block = piece - piece // per_seq * gap
    p_token = ((first + s) * K + i_k)[:, None] * D
    b_w = tl.load(
        w1_ptr + o_c[None, :] * D + o_d[:, None], mask=m_d[:, None] & m_c[None, :], other=0.0
    )
    b_x = tl.load(x_ptr + p_token + o_d[None, :], mask=m_row & m_d[None, :], other=0.0)
    b_z = tl.dot(b_x, b_w, input_precision="ieee")
    b_x = tl.load(x_ptr + p_token + o_c[None, :], mask=m_row & m_c[None, :], other=0.0)
    b_x = b_x.to(tl.float32)
    b_direct = tl.zeros([BM, BC], tl.float32)
    b_dlogits = tl.zeros([BM, BC], tl.float32)
    for r in range(R):
        m_in = ((index >= r) & (index - r < count))[:, None] & m_c[None, :]
        p_block = ((block - r) * K + i_k)[:, None] * D + o_c[None, :]
        p_place = (i_k * BLOCK + r * STRIDE + s) * D + o_c
        b_lse = tl.load(lse_ptr + p_block, mask=m_in, other=float("inf"))
        b_o = tl.load(out_ptr + p_block, mask=m_in, other=0.0)
        b_dout = tl.load(dout_ptr + p_block, mask=m_in, other=0.0).to(tl.float32)
        b_bias = tl.load(bias_ptr + p_place, mask=m_c, other=0.0)
        b_pe = tl.load(pe_ptr + p_place, mask=m_c, other=0.0).to(tl.float32)
        b_pdo = tl.exp(b_z + b_bias[None, :] - b_lse) * b_dout
        b_dl = b_pdo * (b_x + b_pe[None, :] - b_o)
        b_direct += b_pdo
        b_dlogits += b_dl
        p_part = parts_ptr + i_tile * 2 * K * BLOCK * D + p_place
        tl.store(p_part, tl.sum(b_pdo, 0), mask=m_c)
        tl.store(p_part + K * BLOCK * D, tl.sum(b_dl, 0), mask=m_c)
    p_out = p_token + o_c[None, :]
    m_out = m_row & m_c[None, :]
    tl.store(direct_ptr + p_out, b_direct, mask=m_out)
    tl.store(dlogits_ptr + p_out, b_dlogits.to(dlogits_ptr.dtype.element_ty), mask=m_out)
