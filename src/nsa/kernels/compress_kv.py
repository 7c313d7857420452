"""Compression of blocks of tokens, forward and backward, for every kind of phi (eq. 7).

Overlapping blocks are never copied out: a product with a flattened block runs over its tokens,
``W1 flatten(block) = sum_s W1[:, s] x[first + s]``, and reads them where they lie. Positions enter
as what they add to a product, which the host works out once. Backward, tokens are cut into *pieces*
of one stride; a piece gathers from the ``R = BLOCK / STRIDE`` blocks that hold it, so nothing is
added atomically.

A *row* is one block of one kv head (or one piece, or one token), ``row = i * K + head``: ``locate``
says where span ``i`` lies. In a batch that is arithmetic. Packed, it is read from a table of three
int64 lines of ``num`` entries: the first token of slot ``i``, its index in its sequence, and how
many tokens follow from it on. Legend: ``nsa.kernels.tiles``; ``F`` hidden units, ``BF`` and ``BC``
their tile and that of channels, ``BK`` a step of a product.
"""

import triton
import triton.language as tl

from nsa.kernels.tiles import num_visible


@triton.jit(do_not_specialize=["num_seqs", "search_steps", "num"])
def locate_slots_kernel(
    table_ptr,
    cu_seqlens_ptr,
    num_seqs,
    search_steps,
    num,
    STRIDE: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid (slots / BN): the table of packed sequences."""
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    # The last sequence that starts at or before slot i; those before it there hold no span.
    lo = tl.zeros([BN], tl.int32)
    hi = lo + num_seqs
    for _ in range(search_steps):
        mid = (lo + hi) // 2
        before = tl.load(cu_seqlens_ptr + mid) // STRIDE <= i
        lo = tl.where(before, mid, lo)
        hi = tl.where(before, hi, mid)
    start = tl.load(cu_seqlens_ptr + lo).to(tl.int64)
    index = i - start // STRIDE
    first = start + index * STRIDE
    m_i = i < num
    tl.store(table_ptr + i, first, mask=m_i)
    tl.store(table_ptr + num + i, index, mask=m_i)
    tl.store(table_ptr + 2 * num + i, tl.load(cu_seqlens_ptr + lo + 1) - first, mask=m_i)


@triton.jit
def locate(
    i,
    table_ptr,
    num,
    T,
    per_seq,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """First token of a span of ``SIZE``, -1 if there is none; its index; tokens from it on."""
    m_i = i < num
    if PACKED:
        first = tl.load(table_ptr + i, mask=m_i, other=0)
        index = tl.load(table_ptr + num + i, mask=m_i, other=0)
        left = tl.load(table_ptr + 2 * num + i, mask=m_i, other=0)
    else:
        seq = i.to(tl.int32) // per_seq
        index = i.to(tl.int32) % per_seq
        first = seq.to(tl.int64) * T + index * STRIDE
        left = T - index * STRIDE
    return tl.where(m_i & (left >= SIZE), first, -1), index, left


@triton.jit(do_not_specialize=["num", "T", "per_seq"])
def hidden_kernel(
    x_ptr,
    w1_ptr,
    bias_ptr,
    table_ptr,
    out_ptr,
    dout_ptr,
    w2_ptr,
    dhidden_ptr,
    num,
    T,
    per_seq,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    SILU: tl.constexpr,
    GRAD: tl.constexpr,
):
    """Grid (rows / BM, F / BF): ``out [num, K, F]``, the product of W1 and the flattened block.

    ``bias [K, F]`` is what the positions add, fp32. ``SILU`` applies it. ``GRAD`` also writes
    ``dhidden`` like ``out``, the gradient before the silu, from ``dout [num, K, D]`` and
    ``w2 [D, F]``.
    """
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    o_k = tl.arange(0, BK)
    head = o_m % K
    m_m = o_m // K < num
    m_f = (o_f < F)[None, :]
    first, _, _ = locate(o_m // K, table_ptr, num, T, per_seq, BLOCK, STRIDE, PACKED)
    m_row = (first >= 0)[:, None]
    CHUNKS: tl.constexpr = (D + BK - 1) // BK
    p_x = x_ptr + (first * K + head)[:, None] * D + o_k[None, :]
    p_w = w1_ptr + o_f[None, :] * (BLOCK * D) + o_k[:, None]
    b_hidden = tl.load(bias_ptr + head[:, None] * F + o_f[None, :], mask=m_f, other=0.0)
    for i in range(BLOCK * CHUNKS):
        s = i // CHUNKS
        c = i % CHUNKS * BK
        m_k = c + o_k < D
        b_x = tl.load(p_x + (s * K * D + c), mask=m_row & m_k[None, :], other=0.0)
        b_w = tl.load(p_w + (s * D + c), mask=m_k[:, None] & m_f, other=0.0)
        b_hidden = tl.dot(b_x, b_w, b_hidden, input_precision="ieee")
    b_gate = tl.sigmoid(b_hidden)
    b_out = tl.where(m_row, b_hidden * b_gate if SILU else b_hidden, 0.0)
    p_out = o_m[:, None] * F + o_f[None, :]
    m_out = m_m[:, None] & m_f
    tl.store(out_ptr + p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_out)
    if GRAD:
        b_slope = b_gate * (1.0 + b_hidden * (1.0 - b_gate))
        b_dact = tl.zeros([BM, BF], tl.float32)
        for c in range(0, D, BK):
            m_k = c + o_k < D
            b_dout = tl.load(
                dout_ptr + o_m[:, None] * D + (c + o_k)[None, :],
                mask=m_row & m_k[None, :],
                other=0.0,
            )
            b_w = tl.load(
                w2_ptr + (c + o_k)[:, None] * F + o_f[None, :], mask=m_k[:, None] & m_f, other=0.0
            )
            b_dact = tl.dot(b_dout, b_w, b_dact, input_precision="ieee")
        b_dhidden = tl.where(m_row, b_dact * b_slope, 0.0)
        tl.store(dhidden_ptr + p_out, b_dhidden.to(dhidden_ptr.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["num", "T", "per_seq"])
def mean_kernel(
    x_ptr,
    pe_mean_ptr,
    act_ptr,
    w2_ptr,
    table_ptr,
    out_ptr,
    num,
    T,
    per_seq,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    MLP: tl.constexpr,
):
    """Grid (rows / BM, D / BC): ``out [num, K, D]``, the mean of each block.

    ``MLP`` adds ``pe_mean [K, D]`` (fp32) and ``W2 act`` of ``act [num, K, F]``.
    """
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    head = o_m % K
    m_m = o_m // K < num
    m_c = (o_c < D)[None, :]
    first, _, _ = locate(o_m // K, table_ptr, num, T, per_seq, BLOCK, STRIDE, PACKED)
    m_row = (first >= 0)[:, None]
    p_x = x_ptr + (first * K + head)[:, None] * D + o_c[None, :]
    b_out = tl.zeros([BM, BC], tl.float32)
    for s in tl.range(0, BLOCK, loop_unroll_factor=8):
        b_out += tl.load(p_x + s * K * D, mask=m_row & m_c, other=0.0).to(tl.float32)
    b_out *= 1.0 / BLOCK
    if MLP:
        b_out += tl.load(pe_mean_ptr + head[:, None] * D + o_c[None, :], mask=m_c, other=0.0)
        o_k = tl.arange(0, BK)
        for f in range(0, F, BK):
            m_k = f + o_k < F
            b_act = tl.load(
                act_ptr + o_m[:, None] * F + (f + o_k)[None, :],
                mask=m_m[:, None] & m_k[None, :],
                other=0.0,
            )
            b_w = tl.load(
                w2_ptr + o_c[None, :] * F + (f + o_k)[:, None], mask=m_k[:, None] & m_c, other=0.0
            )
            b_out = tl.dot(b_act, b_w, b_out, input_precision="ieee")
    b_out = tl.where(m_row, b_out, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + o_m[:, None] * D + o_c[None, :], b_out, mask=m_m[:, None] & m_c)


@triton.jit(do_not_specialize=["num", "T", "per_seq", "gap"])
def token_gradients_kernel(
    dhidden_ptr,
    w1_ptr,
    dout_ptr,
    table_ptr,
    dx_ptr,
    num,
    T,
    per_seq,
    gap,
    scale,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    HIDDEN: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Grid (rows of pieces / BM, STRIDE * D / BC): ``dx`` of the tokens of every piece.

    Adds over the blocks that hold a token: ``HIDDEN`` ``dhidden [blocks, K, F]`` times its slice of
    W1, ``MEAN`` ``scale * dout [blocks, K, D]``. A sequence has ``gap`` blocks less than pieces.
    """
    R: tl.constexpr = BLOCK // STRIDE
    TILES: tl.constexpr = (D + BC - 1) // BC
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    s = tl.program_id(1) // TILES
    o_c = tl.program_id(1) % TILES * BC + tl.arange(0, BC)
    piece = o_m // K
    head = o_m % K
    m_c = (o_c < D)[None, :]
    first, index, left = locate(piece, table_ptr, num, T, per_seq, STRIDE, STRIDE, PACKED)
    count = num_visible(index * STRIDE + left - 1, BLOCK, STRIDE)
    index = tl.where(first >= 0, index, -1)  # a piece that does not exist is in no block
    row = (piece - piece // per_seq * gap) * K + head
    b_dx = tl.zeros([BM, BC], tl.float32)
    if MEAN:
        for r in range(R):
            m_in = (index >= r) & (index - r < count)
            p_dout = dout_ptr + (row - r * K)[:, None] * D + o_c[None, :]
            b_dx += tl.load(p_dout, mask=m_in[:, None] & m_c, other=0.0).to(tl.float32)
        b_dx *= scale
    if HIDDEN:
        CHUNKS: tl.constexpr = (F + BK - 1) // BK
        o_k = tl.arange(0, BK)
        p_dhidden = dhidden_ptr + row[:, None] * F + o_k[None, :]
        p_w = w1_ptr + o_k[:, None] * (BLOCK * D) + (s * D + o_c)[None, :]
        for i in range(R * CHUNKS):
            r = i // CHUNKS
            f = i % CHUNKS * BK
            m_in = (index >= r) & (index - r < count)
            m_k = f + o_k < F
            b_dhidden = tl.load(
                p_dhidden + (f - r * K * F), mask=m_in[:, None] & m_k[None, :], other=0.0
            )
            b_w = tl.load(
                p_w + f * (BLOCK * D) + r * (STRIDE * D), mask=m_k[:, None] & m_c, other=0.0
            )
            b_dx = tl.dot(b_dhidden, b_w, b_dx, input_precision="ieee")
    p_dx = dx_ptr + ((first + s) * K + head)[:, None] * D + o_c[None, :]
    tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=(first >= 0)[:, None] & m_c)


@triton.jit(do_not_specialize=["num", "T", "per_seq", "segment"])
def weight_gradients_kernel(
    g_ptr,
    x_ptr,
    sums_ptr,
    pe_ptr,
    table_ptr,
    parts_ptr,
    num,
    T,
    per_seq,
    segment,
    K: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid (F / BF * D / BC, BLOCK, parts): ``parts [parts, F, BLOCK, D]``, fp32.

    Part ``p`` sums ``g[row] x[row]^T`` over its ``segment`` rows. With ``BLOCKS``, ``x`` holds
    tokens and a row's vector is its flattened block with positions, which enter part 0 by
    ``sums [K, F]``, those of ``g`` over blocks; else (``BLOCK`` 1) it has ``g``'s rows.
    """
    TILES: tl.constexpr = (D + BC - 1) // BC
    o_f = tl.program_id(0) // TILES * BF + tl.arange(0, BF)
    o_c = tl.program_id(0) % TILES * BC + tl.arange(0, BC)
    s = tl.program_id(1)
    i_part = tl.program_id(2).to(tl.int64)
    m_f = (o_f < F)[None, :]
    m_c = (o_c < D)[None, :]
    b_sum = tl.zeros([BF, BC], tl.float32)
    for m in range(i_part * segment, (i_part + 1) * segment, BM):
        o_m = m + tl.arange(0, BM)
        first, _, _ = locate(o_m // K, table_ptr, num, T, per_seq, SIZE, STRIDE, PACKED)
        m_row = (first >= 0)[:, None]
        p_x = (first + s) * K + o_m % K if BLOCKS else o_m
        b_g = tl.load(g_ptr + o_m[:, None] * F + o_f[None, :], mask=m_row & m_f, other=0.0)
        b_x = tl.load(x_ptr + p_x[:, None] * D + o_c[None, :], mask=m_row & m_c, other=0.0)
        b_sum = tl.dot(tl.trans(b_g), b_x, b_sum, input_precision="ieee")
    if BLOCKS:
        for h in tl.range(0, tl.where(i_part == 0, K, 0), num_stages=1):
            b_g = tl.load(sums_ptr + h * F + o_f, mask=o_f < F, other=0.0)
            b_x = tl.load(pe_ptr + (h * BLOCK + s) * D + o_c, mask=o_c < D, other=0.0)
            b_sum += b_g[:, None] * b_x[None, :].to(tl.float32)
    p_out = ((i_part * F + o_f) * BLOCK + s)[:, None] * D + o_c[None, :]
    tl.store(parts_ptr + p_out, b_sum, mask=(o_f < F)[:, None] & m_c)


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
