"""Compression of blocks of tokens, forward and backward, for most kinds of phi (eq. 7).

Overlapping blocks are never copied out: a product with a flattened block runs over its tokens,
``W1 flatten(block) = sum_s W1[:, s] x[first + s]``, and reads them where they lie. Positions enter
as what they add to a product. Backward, tokens are cut into *pieces* of one stride; a piece gathers
from the ``R = BLOCK / STRIDE`` blocks that hold it, so nothing is added atomically.

Keys and values are two *sides* of the same shape, ``x_k_ptr`` and ``x_v_ptr``, that one launch does
together: an axis of the grid says which one a program works on. One side alone is given twice.

A *row* is one block of one kv head (or one piece, or one token), ``row = i * K + head``: ``locate``
says where span ``i`` lies. In a batch that is arithmetic. Packed, it is read from a table of three
int64 lines of ``num`` entries: the first token of slot ``i``, its index in its sequence, and how
many tokens follow from it on. Legend: ``nsa.kernels.tiles``; ``F`` hidden units, ``BF`` and ``BC``
their tile and that of channels, ``BK`` a step of a product.
"""

import triton
import triton.language as tl

from nsa.kernels.tiles import num_visible, opaque


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


@triton.jit
def of_side(side, k_ptr, v_ptr):
    """The pointer of side 0, keys, or 1, values."""
    return k_ptr if side == 0 else v_ptr


@triton.jit(do_not_specialize=["num", "T", "per_seq"])
def hidden_kernel(
    x_k_ptr,
    x_v_ptr,
    pe_k_ptr,
    pe_v_ptr,
    w1_k_ptr,
    w1_v_ptr,
    table_ptr,
    out_k_ptr,
    out_v_ptr,
    dout_k_ptr,
    dout_v_ptr,
    w2_k_ptr,
    w2_v_ptr,
    dhidden_k_ptr,
    dhidden_v_ptr,
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
    """Grid (blocks / (BM - 1), F / BF, sides * K): ``out [num, K, F]``, W1 times flattened blocks.

    A tile has the blocks of one kv head and, as its last row, its positions: what their product
    with W1 adds to that of every block. ``SILU`` applies it. ``GRAD`` also writes ``dhidden`` like
    ``out``, the gradient before the silu, from ``dout [num, K, D]`` and ``w2 [D, F]``.
    """
    side = tl.program_id(2) // K
    head = tl.program_id(2) % K
    x_ptr = of_side(side, x_k_ptr, x_v_ptr)
    pe_ptr = of_side(side, pe_k_ptr, pe_v_ptr)
    w1_ptr = of_side(side, w1_k_ptr, w1_v_ptr)
    out_ptr = of_side(side, out_k_ptr, out_v_ptr)
    o_m = tl.arange(0, BM)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    o_k = tl.arange(0, BK)
    m_pe = o_m == BM - 1
    m_f = (o_f < F)[None, :]
    i = tl.program_id(0).to(tl.int64) * (BM - 1) + o_m
    first, _, _ = locate(i, table_ptr, num, T, per_seq, BLOCK, STRIDE, PACKED)
    m_row = ((first >= 0) & ~m_pe)[:, None]
    m_x = m_row | m_pe[:, None]
    CHUNKS: tl.constexpr = (D + BK - 1) // BK
    p_x = tl.where(m_pe, pe_ptr + head * (BLOCK * D), x_ptr + (first * K + head) * D)[:, None]
    stride_s = tl.where(m_pe, D, K * D)[:, None]
    p_w = w1_ptr + o_f[None, :] * (BLOCK * D) + o_k[:, None]
    b_hidden = tl.zeros([BM, BF], tl.float32)
    for j in range(BLOCK * CHUNKS):
        s = j // CHUNKS
        c = j % CHUNKS * BK
        m_k = c + o_k < D
        b_x = tl.load(p_x + s * stride_s + (c + o_k)[None, :], mask=m_x & m_k[None, :], other=0.0)
        b_w = tl.load(p_w + (s * D + c), mask=m_k[:, None] & m_f, other=0.0)
        b_hidden = tl.dot(b_x, b_w, b_hidden, input_precision="ieee")
    b_hidden += tl.sum(tl.where(m_pe[:, None], b_hidden, 0.0), 0)[None, :]
    b_gate = tl.sigmoid(b_hidden)
    b_out = tl.where(m_row, b_hidden * b_gate if SILU else b_hidden, 0.0)
    row = (i * K + head)[:, None]
    p_out = row * F + o_f[None, :]
    m_out = ((i < num) & ~m_pe)[:, None] & m_f
    tl.store(out_ptr + p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_out)
    if GRAD:
        dout_ptr = of_side(side, dout_k_ptr, dout_v_ptr)
        w2_ptr = of_side(side, w2_k_ptr, w2_v_ptr)
        dhidden_ptr = of_side(side, dhidden_k_ptr, dhidden_v_ptr)
        b_slope = b_gate * (1.0 + b_hidden * (1.0 - b_gate))
        b_dact = tl.zeros([BM, BF], tl.float32)
        for c in range(0, D, BK):
            m_k = c + o_k < D
            p_dout = dout_ptr + row * D + (c + o_k)[None, :]
            b_dout = tl.load(p_dout, mask=m_row & m_k[None, :], other=0.0)
            p_w = w2_ptr + (c + o_k)[:, None] * F + o_f[None, :]
            b_w = tl.load(p_w, mask=m_k[:, None] & m_f, other=0.0)
            b_dact = tl.dot(b_dout, b_w, b_dact, input_precision="ieee")
        b_dhidden = tl.where(m_row, b_dact * b_slope, 0.0)
        tl.store(dhidden_ptr + p_out, b_dhidden.to(dhidden_ptr.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["num", "T", "per_seq"])
def mean_kernel(
    x_k_ptr,
    x_v_ptr,
    pe_k_ptr,
    pe_v_ptr,
    act_k_ptr,
    act_v_ptr,
    w2_k_ptr,
    w2_v_ptr,
    table_ptr,
    out_k_ptr,
    out_v_ptr,
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
    """Grid (blocks / BM, D / BC, sides * K): ``out [num, K, D]``, the mean of each block.

    ``MLP`` adds the mean of the positions ``pe [K, BLOCK, D]`` and ``W2 act`` of ``act [num, K,
    F]``.
    """
    side = tl.program_id(2) // K
    head = tl.program_id(2) % K
    x_ptr = of_side(side, x_k_ptr, x_v_ptr)
    out_ptr = of_side(side, out_k_ptr, out_v_ptr)
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    row = (i * K + head)[:, None]
    m_i = (i < num)[:, None]
    m_c = (o_c < D)[None, :]
    first, _, _ = locate(i, table_ptr, num, T, per_seq, BLOCK, STRIDE, PACKED)
    m_row = (first >= 0)[:, None]
    p_x = x_ptr + (first * K + head)[:, None] * D + o_c[None, :]
    p_pe = of_side(side, pe_k_ptr, pe_v_ptr) + head * (BLOCK * D) + o_c[None, :]
    b_out = tl.zeros([BM, BC], tl.float32)
    for s in tl.range(0, BLOCK, loop_unroll_factor=8):
        b_out += tl.load(p_x + s * K * D, mask=m_row & m_c, other=0.0).to(tl.float32)
        if MLP:
            b_out += tl.load(p_pe + s * D, mask=m_c, other=0.0).to(tl.float32)
    b_out *= 1.0 / BLOCK
    if MLP:
        act_ptr = of_side(side, act_k_ptr, act_v_ptr)
        w2_ptr = of_side(side, w2_k_ptr, w2_v_ptr)
        o_k = tl.arange(0, BK)
        for f in range(0, F, BK):
            m_k = f + o_k < F
            p_act = act_ptr + row * F + (f + o_k)[None, :]
            b_act = tl.load(p_act, mask=m_i & m_k[None, :], other=0.0)
            p_w = w2_ptr + o_c[None, :] * F + (f + o_k)[:, None]
            b_w = tl.load(p_w, mask=m_k[:, None] & m_c, other=0.0)
            b_out = tl.dot(b_act, b_w, b_out, input_precision="ieee")
    i = opaque(tl.program_id(0)).to(tl.int64) * BM + tl.arange(0, BM)
    p_out = out_ptr + (i * K + head)[:, None] * D + o_c[None, :]
    b_out = tl.where(m_row, b_out, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(p_out, b_out, mask=(i < num)[:, None] & m_c)


@triton.jit(do_not_specialize=["num", "T", "per_seq", "gap"])
def token_gradients_kernel(
    dhidden_k_ptr,
    dhidden_v_ptr,
    w1_k_ptr,
    w1_v_ptr,
    dout_k_ptr,
    dout_v_ptr,
    table_ptr,
    dx_k_ptr,
    dx_v_ptr,
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
    """Grid (rows of pieces / BM, STRIDE * D / BC, sides): ``dx`` of the tokens of every piece.

    Adds over the blocks that hold a token: ``HIDDEN`` ``dhidden [blocks, K, F]`` times its slice of
    W1, ``MEAN`` ``scale * dout [blocks, K, D]``. A sequence has ``gap`` blocks less than pieces.
    """
    R: tl.constexpr = BLOCK // STRIDE
    TILES: tl.constexpr = (D + BC - 1) // BC
    side = tl.program_id(2)
    dhidden_ptr = of_side(side, dhidden_k_ptr, dhidden_v_ptr)
    w1_ptr = of_side(side, w1_k_ptr, w1_v_ptr)
    dout_ptr = of_side(side, dout_k_ptr, dout_v_ptr)
    dx_ptr = of_side(side, dx_k_ptr, dx_v_ptr)
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


@triton.jit
def position_gradients(
    sums_ptr,
    w1_ptr,
    dout_sums_ptr,
    dpe_ptr,
    s,
    o_c,
    K: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BF: tl.constexpr,
    BC: tl.constexpr,
    MEAN: tl.constexpr,
):
    """``dpe [K, BLOCK, D]`` of place ``s`` and channels ``o_c``: through W1, ``MEAN`` the mean."""
    m_c = o_c < D
    for h in tl.range(0, K, num_stages=1):
        b_dpe = tl.zeros([BC], tl.float32)
        if MEAN:
            b_dpe += tl.load(dout_sums_ptr + h * D + o_c, mask=m_c, other=0.0) * (1.0 / BLOCK)
        for f in tl.range(0, F, BF, num_stages=1):
            o_f = f + tl.arange(0, BF)
            b_sum = tl.load(sums_ptr + h * F + o_f, mask=o_f < F, other=0.0)
            p_w = w1_ptr + o_f[:, None] * (BLOCK * D) + (s * D + o_c)[None, :]
            b_w = tl.load(p_w, mask=(o_f < F)[:, None] & m_c[None, :], other=0.0)
            b_dpe += tl.sum(b_sum[:, None] * b_w.to(tl.float32), 0)
        p_dpe = dpe_ptr + (h * BLOCK + s) * D + o_c
        tl.store(p_dpe, b_dpe.to(dpe_ptr.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["num", "T", "per_seq", "segment"])
def weight_gradients_kernel(
    g_k_ptr,
    g_v_ptr,
    x_k_ptr,
    x_v_ptr,
    pe_k_ptr,
    pe_v_ptr,
    w1_k_ptr,
    w1_v_ptr,
    sums_k_ptr,
    sums_v_ptr,
    dout_sums_k_ptr,
    dout_sums_v_ptr,
    table_ptr,
    dpe_k_ptr,
    dpe_v_ptr,
    parts_k_ptr,
    parts_v_ptr,
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
    MEAN: tl.constexpr,
):
    """Grid (F / BF * D / BC, sides * BLOCK, parts): ``parts [parts, F, BLOCK, D]``.

    Part ``p`` sums ``g[row] x[row]^T`` over its ``segment`` rows. With ``BLOCKS``, ``x`` holds
    tokens and a row's vector is its flattened block with positions, which enter part 0 by
    ``sums [K, F]``, those of ``g`` over blocks; else (``BLOCK`` 1) it has ``g``'s rows. ``BLOCKS``
    also writes ``dpe``, see ``position_gradients``, by programs before those of part 0.
    """
    TILES: tl.constexpr = (D + BC - 1) // BC
    side = tl.program_id(1) // BLOCK
    s = tl.program_id(1) % BLOCK
    g_ptr = of_side(side, g_k_ptr, g_v_ptr)
    x_ptr = of_side(side, x_k_ptr, x_v_ptr)
    pe_ptr = of_side(side, pe_k_ptr, pe_v_ptr)
    sums_ptr = of_side(side, sums_k_ptr, sums_v_ptr)
    parts_ptr = of_side(side, parts_k_ptr, parts_v_ptr)
    i_f = tl.program_id(0) // TILES
    o_f = i_f * BF + tl.arange(0, BF)
    o_c = tl.program_id(0) % TILES * BC + tl.arange(0, BC)
    i_part = tl.program_id(2).to(tl.int64) - BLOCKS
    if i_part < 0:
        if i_f == 0:
            w1_ptr = of_side(side, w1_k_ptr, w1_v_ptr)
            dout_sums_ptr = of_side(side, dout_sums_k_ptr, dout_sums_v_ptr)
            dpe_ptr = of_side(side, dpe_k_ptr, dpe_v_ptr)
            position_gradients(
                sums_ptr, w1_ptr, dout_sums_ptr, dpe_ptr, s, o_c, K, F, D, BLOCK, BF, BC, MEAN
            )
        return
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
    tl.store(parts_ptr + p_out, b_sum.to(parts_ptr.dtype.element_ty), mask=(o_f < F)[:, None] & m_c)
