"""Compressed attention and block scores for Hopper, where waits are written by hand (Gluon).

Triton waits for every product before the softmax that follows it. Here the copy engine fills a ring
of key and value tiles while products run behind the exponentials.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa.kernels.tiles import locate_tile, num_visible

# Triton 3.6 and 3.7 name it differently.
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def _exp2(x):
    """Flushes denormals: three instructions fewer than ``gl.exp2``."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _tile_range(
    i_flat,
    last_tile,
    tiles,
    K: gl.constexpr,
    BQ: gl.constexpr,
    BN: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    PACKED: gl.constexpr,
):
    """Where program ``i_flat`` works, the longest tiles first.

    Returns kv head, first token in its sequence, first rows of q and slots, number of queries,
    steps of keys, and how many of them, the last, need masks.
    """
    cu_seqlens_ptr, tile_offsets_ptr, num_seqs, T_q, T_c, q_offset = tiles
    i_k = i_flat % K
    i_tile = last_tile - i_flat // K
    t_0, q_0, _, c_0, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, tile_offsets_ptr, num_seqs, T_q, T_q, T_c, BQ, STRIDE, PACKED
    )
    n_all = num_visible(q_offset + t_0, BLOCK, STRIDE)
    n_any = num_visible(q_offset + gl.minimum(t_0 + BQ, n_q) - 1, BLOCK, STRIDE)
    steps = gl.where(t_0 < n_q, (n_any + BN - 1) // BN, 0)
    masked = gl.maximum(steps - n_all // BN, 0)
    return i_k, t_0, q_0, c_0.to(gl.int32), n_q, steps, masked


@gluon.jit
def _attention_producer(
    tiles,
    q_desc,
    k_desc,
    v_desc,
    q_s,
    k_s,
    v_s,
    bars,
    num_tiles,
    i_first,
    G: gl.constexpr,
    K: gl.constexpr,
    DK: gl.constexpr,
    DV: gl.constexpr,
    BQ: gl.constexpr,
    BN: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """One warp: copies queries, keys and values, from the last keys to the first."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    i_copy = 0
    i_turn = 0
    for i_flat in range(i_first, num_tiles * K, gl.num_programs(0)):
        i_k, t_0, q_0, c_0, n_q, steps, masked = _tile_range(
            i_flat, num_tiles - 1, tiles, K, BQ, BN, BLOCK, STRIDE, PACKED
        )
        mbarrier.wait(q_empty, (i_turn & 1) ^ 1)
        mbarrier.expect(q_full, q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q_desc, [(q_0 + t_0).to(gl.int32), i_k * G, 0], q_full, q_s
        )
        i_turn += 1
        for j in range(steps):
            i_s = i_copy % STAGES
            phase = ((i_copy // STAGES) & 1) ^ 1
            row = c_0 + (steps - 1 - j) * BN
            mbarrier.wait(k_empty.index(i_s), phase)
            mbarrier.expect(k_full.index(i_s), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [row, i_k * DK], k_full.index(i_s), k_s.index(i_s)
            )
            mbarrier.wait(v_empty.index(i_s), phase)
            mbarrier.expect(v_full.index(i_s), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_desc, [row, i_k * DV], v_full.index(i_s), v_s.index(i_s)
            )
            i_copy += 1


@gluon.jit
def _softmax(b_s, b_m, b_l, scale_log2, first_key, b_visible, o_n, MASKED: gl.constexpr):
    """Probabilities of raw logits ``[64, BN]``, new maximum (base 2, scaled), sum and rescaling."""
    if MASKED:
        b_s = gl.where((first_key + o_n)[None, :] < b_visible[:, None], b_s, float("-inf"))
    b_m_new = gl.maximum(b_m, gl.max(b_s, 1) * scale_log2)
    b_m_safe = b_m_new
    if MASKED:
        # Rows that have seen no key yet keep m = -inf: see ``nsa.kernels.tiles.softmax_step``.
        b_m_safe = gl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = _exp2(b_s * scale_log2 - b_m_safe[:, None])
    b_alpha = _exp2(b_m - b_m_safe)
    return b_p, b_m_new, b_l * b_alpha + gl.sum(b_p, 1), b_alpha


@gluon.jit
def _attention_step(
    j,
    steps,
    i_copy,
    q_s,
    k_s,
    v_s,
    bars,
    b_p,
    b_m,
    b_l,
    b_acc,
    zero,
    scale_log2,
    b_visible,
    o_n,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Softmax of tile ``j`` while the product with values of tile ``j - 1`` runs."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    i_s = i_copy % STAGES
    i_v = (i_copy - 1) % STAGES
    b_s = warpgroup_mma(
        q_s, k_s.index(i_s).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    mbarrier.wait(v_full.index(i_v), ((i_copy - 1) // STAGES) & 1)
    b_acc = warpgroup_mma(b_p, v_s.index(i_v), b_acc, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    mbarrier.arrive(k_empty.index(i_s), count=1)
    b_e, b_m, b_l, b_alpha = _softmax(
        b_s, b_m, b_l, scale_log2, (steps - 1 - j) * BN, b_visible, o_n, MASKED
    )
    i_n = (i_copy + 1) % STAGES
    mbarrier.wait(k_full.index(i_n), ((i_copy + 1) // STAGES) & 1, pred=j + 1 < steps)
    b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
    mbarrier.arrive(v_empty.index(i_v), count=1)
    b_acc = b_acc * gl.convert_layout(b_alpha, gl.SliceLayout(1, b_acc.type.layout))[:, None]
    b_p = gl.convert_layout(b_e.to(b_p.dtype), b_p.type.layout)
    return b_p, b_m, b_l, b_acc


@gluon.jit
def _attention_consumer(
    tiles,
    o_ptr,
    lse_ptr,
    q_s,
    k_s,
    v_s,
    bars,
    num_tiles,
    i_first,
    scale_log2,
    ROW: gl.constexpr,
    H: gl.constexpr,
    K: gl.constexpr,
    G: gl.constexpr,
    DV: gl.constexpr,
    BQ: gl.constexpr,
    BN: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """One warp group: rows ``ROW`` to ``ROW + 64`` of every tile."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    q_offset = tiles[5]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    zero = gl.zeros([64, BN], gl.float32, s_layout)
    o_n = gl.arange(0, BN, gl.SliceLayout(0, s_layout))
    o_m = ROW + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    q_mine = q_s.reshape([BQ * G, q_s.shape[2]]).slice(ROW, 64)
    i_copy = 0
    i_turn = 0
    for i_flat in range(i_first, num_tiles * K, gl.num_programs(0)):
        i_k, t_0, q_0, c_0, n_q, steps, masked = _tile_range(
            i_flat, num_tiles - 1, tiles, K, BQ, BN, BLOCK, STRIDE, PACKED
        )
        o_t = t_0 + o_m // G
        b_visible = num_visible(q_offset + o_t, BLOCK, STRIDE)
        b_m = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        b_l = gl.zeros([64], gl.float32, gl.SliceLayout(1, s_layout))
        b_acc = gl.zeros([64, DV], gl.float32, o_layout)
        mbarrier.wait(q_full, i_turn & 1)
        i_turn += 1
        if steps > 0:
            i_s = i_copy % STAGES
            mbarrier.wait(k_full.index(i_s), (i_copy // STAGES) & 1)
            b_s = warpgroup_mma(
                q_mine, k_s.index(i_s).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            b_s = warpgroup_mma_wait(0, deps=(b_s,))
            mbarrier.arrive(k_empty.index(i_s), count=1)
            b_e, b_m, b_l, _ = _softmax(
                b_s, b_m, b_l, scale_log2, (steps - 1) * BN, b_visible, o_n, True
            )
            b_p = gl.convert_layout(b_e.to(q_s.dtype), p_layout)
            i_copy += 1
            i_s = i_copy % STAGES
            mbarrier.wait(k_full.index(i_s), (i_copy // STAGES) & 1, pred=steps > 1)
            for j in range(1, masked):
                b_p, b_m, b_l, b_acc = _attention_step(
                    j, steps, i_copy, q_mine, k_s, v_s, bars, b_p, b_m, b_l, b_acc, zero,
                    scale_log2, b_visible, o_n, BN, STAGES, True,
                )
                i_copy += 1
            for j in range(gl.maximum(masked, 1), steps):
                b_p, b_m, b_l, b_acc = _attention_step(
                    j, steps, i_copy, q_mine, k_s, v_s, bars, b_p, b_m, b_l, b_acc, zero,
                    scale_log2, b_visible, o_n, BN, STAGES, False,
                )
                i_copy += 1
            i_v = (i_copy - 1) % STAGES
            mbarrier.arrive(q_empty, count=1)
            mbarrier.wait(v_full.index(i_v), ((i_copy - 1) // STAGES) & 1)
            b_acc = warpgroup_mma(b_p, v_s.index(i_v), b_acc, is_async=True)
            b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
            mbarrier.arrive(v_empty.index(i_v), count=1)
        else:
            mbarrier.arrive(q_empty, count=1)
        p_row = (q_0 + o_t) * H + i_k * G + o_m % G
        gl.store(lse_ptr + p_row, (b_m + gl.log2(b_l)) * 0.6931471805599453, mask=o_t < n_q)
        b_inv = 1.0 / gl.where(b_l == 0.0, 1.0, b_l)
        b_acc = b_acc * gl.convert_layout(b_inv, gl.SliceLayout(1, o_layout))[:, None]
        o_r = gl.convert_layout(p_row, gl.SliceLayout(1, o_layout))
        m_r = gl.convert_layout((o_t < n_q).to(gl.int32), gl.SliceLayout(1, o_layout)) != 0
        o_d = gl.arange(0, DV, gl.SliceLayout(0, o_layout))
        p_o = o_ptr + o_r[:, None] * DV + o_d[None, :]
        gl.store(p_o, b_acc.to(q_s.dtype), mask=m_r[:, None])


@gluon.jit
def hopper_attention_fwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    tile_offsets_ptr,
    num_tiles,
    num_seqs,
    T_q,
    T_c,
    q_offset,
    scale_log2,
    H: gl.constexpr,
    K: gl.constexpr,
    G: gl.constexpr,
    DK: gl.constexpr,
    DV: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """Grid: programs that share the tiles, ``K * num_tiles`` at most."""
    BQ: gl.constexpr = BM // G
    q_s = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_shape, q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, DK], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BN, DV], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    _barrier()
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    tiles = (cu_seqlens_ptr, tile_offsets_ptr, num_seqs, T_q, T_c, q_offset)
    i_first = gl.program_id(0)
    gl.warp_specialize(
        [
            (_attention_consumer, (tiles, o_ptr, lse_ptr, q_s, k_s, v_s, bars, num_tiles, i_first,
             scale_log2, 0, H, K, G, DV, BQ, BN, BLOCK, STRIDE, STAGES, PACKED)),
            (_attention_consumer, (tiles, o_ptr, lse_ptr, q_s, k_s, v_s, bars, num_tiles, i_first,
             scale_log2, 64, H, K, G, DV, BQ, BN, BLOCK, STRIDE, STAGES, PACKED)),
            (_attention_producer, (tiles, q_desc, k_desc, v_desc, q_s, k_s, v_s, bars, num_tiles,
             i_first, G, K, DK, DV, BQ, BN, BLOCK, STRIDE, STAGES, PACKED)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _scores_producer(
    tiles,
    k_desc,
    k_s,
    k_full,
    k_empty,
    last_tile,
    num_tiles,
    K: gl.constexpr,
    DK: gl.constexpr,
    BQ: gl.constexpr,
    BN: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """One warp: copies keys, from the last to the first, an even number of steps."""
    i_copy = 0
    for i_flat in range(gl.program_id(0), num_tiles * K, gl.num_programs(0)):
        i_k, t_0, q_0, c_0, n_q, steps, masked = _tile_range(
            i_flat, last_tile, tiles, K, BQ, BN, BLOCK, STRIDE, PACKED
        )
        total = (steps + 1) // 2 * 2
        for j in range(total):
            i_s = i_copy % STAGES
            mbarrier.wait(k_empty.index(i_s), ((i_copy // STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(i_s), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [c_0 + (total - 1 - j) * BN, i_k * DK], k_full.index(i_s), k_s.index(i_s)
            )
            i_copy += 1


@gluon.jit
def _row_of_column(o_m, GP: gl.constexpr, BQ: gl.constexpr):
    """Token and head of column ``o_m``, so that a thread of the accumulator holds whole tokens.

    A thread holds two columns of every eight. They and every eighth are heads; the four threads
    that share a row hold different tokens, if there are as many.
    """
    if GP == 1:
        return o_m, o_m * 0
    else:
        LANES: gl.constexpr = 4 if BQ >= 4 else BQ
        LOW: gl.constexpr = GP // 2 // (4 // LANES)
        low = o_m // 8 % LOW
        token = o_m // (8 * LOW) * LANES + o_m // 2 % LANES
        head = (low * (4 // LANES) + o_m // 2 % 4 // LANES) * 2 + o_m % 2
        return token, head


@gluon.jit
def _sum_heads(b_p, BN: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr):
    """``[BN, BQ * GP] -> [BN, BQ]``, columns as ``_row_of_column`` has them."""
    if GP == 1:
        return b_p
    else:
        LANES: gl.constexpr = 4 if BQ >= 4 else BQ
        LOW: gl.constexpr = GP // 2 // (4 // LANES)
        b_p = gl.reshape(b_p, [BN, BQ // LANES, LOW, 4 // LANES, LANES, 2])
        return gl.reshape(gl.sum(gl.sum(gl.sum(b_p, 5), 2), 2), [BN, BQ])


@gluon.jit
def _scores_step(
    b_s,
    b_lse,
    first_key,
    n_any,
    b_visible,
    out,
    scale_log2,
    BN: gl.constexpr,
    GP: gl.constexpr,
    BQ: gl.constexpr,
    S: gl.constexpr,
    W: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Writes the sums of one step's logits ``[BN, BQ * GP]``: see ``block_scores_kernel``."""
    NB: gl.constexpr = BN // S
    own_ptr, next_ptr, i_row, n_rows, K, i_k, stride_row = out
    b_p = _exp2(b_s * scale_log2 - b_lse[None, :])
    if MASKED:
        o_n = first_key + gl.arange(0, BN, gl.SliceLayout(1, b_s.type.layout))
        b_p = gl.where(o_n[:, None] < b_visible[None, :], b_p, 0.0)
    b_p = gl.reshape(_sum_heads(b_p, BN, GP, BQ), [NB, S, BQ])
    o_s = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(2, b_p.type.layout)))
    w_own = gl.minimum(S - o_s, W).to(gl.float32)
    w_next = gl.maximum(W - (S - o_s), 0).to(gl.float32)
    w_own = gl.expand_dims(gl.expand_dims(w_own, 0), 2)
    w_next = gl.expand_dims(gl.expand_dims(w_next, 0), 2)
    b_own = gl.sum(b_p * w_own, 1)  # [NB, BQ]
    b_next = gl.sum(b_p * w_next, 1)
    o_j = first_key // S + gl.arange(0, NB, gl.SliceLayout(1, b_own.type.layout))
    o_q = gl.arange(0, BQ, gl.SliceLayout(0, b_own.type.layout))
    p_out = ((i_row + o_q) * K + i_k)[None, :] * stride_row + o_j[:, None]
    m_out = (o_q < n_rows)[None, :]
    if MASKED:
        m_out = m_out & (o_j < (n_any + S - 1) // S)[:, None]
    gl.store(own_ptr + p_out, b_own, mask=m_out)
    gl.store(next_ptr + p_out, b_next, mask=m_out)


@gluon.jit
def _scores_pair(
    i_copy,
    more,
    q_s,
    k_s,
    k_full,
    k_empty,
    b_s,
    zero,
    b_lse,
    first_key,
    n_any,
    b_visible,
    out,
    scale_log2,
    BN: gl.constexpr,
    GP: gl.constexpr,
    BQ: gl.constexpr,
    S: gl.constexpr,
    W: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Two steps, whose logits keep different registers; the keys of the second are here."""
    i_s = i_copy % STAGES
    b_next = warpgroup_mma(k_s.index(i_s), q_s.permute((1, 0)), zero, use_acc=False, is_async=True)
    _scores_step(
        b_s, b_lse, first_key, n_any, b_visible, out, scale_log2, BN, GP, BQ, S, W, MASKED
    )
    i_n = (i_copy + 1) % STAGES
    # A wait between two products also keeps the compiler from moving the wait for the second
    # before the exponentials.
    mbarrier.wait(k_full.index(i_n), ((i_copy + 1) // STAGES) & 1, pred=more)
    b_next = warpgroup_mma_wait(0, deps=(b_next,))
    mbarrier.arrive(k_empty.index(i_s), count=1)
    # Without another pair, the product of what the stage holds is not looked at.
    b_s = warpgroup_mma(k_s.index(i_n), q_s.permute((1, 0)), zero, use_acc=False, is_async=True)
    _scores_step(
        b_next, b_lse, first_key - BN, n_any, b_visible, out, scale_log2, BN, GP, BQ, S, W, MASKED
    )
    i_m = (i_copy + 2) % STAGES
    mbarrier.wait(k_full.index(i_m), ((i_copy + 2) // STAGES) & 1, pred=more)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    mbarrier.arrive(k_empty.index(i_n), count=1, pred=more)
    return b_s


@gluon.jit
def _scores_consumer(
    tiles,
    q_ptr,
    lse_ptr,
    own_ptr,
    next_ptr,
    q_s,
    k_s,
    k_full,
    k_empty,
    first_tile,
    last_tile,
    num_tiles,
    scale_log2,
    stride_row,
    HALF: gl.constexpr,
    H: gl.constexpr,
    K: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    DK: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    S: gl.constexpr,
    W: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """One warp group: half ``HALF`` of the tokens of every tile."""
    COLS: gl.constexpr = BM // 2
    BQ: gl.constexpr = COLS // GP
    q_offset = tiles[5]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DK, DK // 8], [4, 1], [1, 0])
    zero = gl.zeros([BN, COLS], gl.float32, s_layout)
    o_d = gl.arange(0, DK, gl.SliceLayout(0, q_layout))
    q_token, q_head = _row_of_column(gl.arange(0, COLS, gl.SliceLayout(1, q_layout)), GP, BQ)
    s_token, s_head = _row_of_column(gl.arange(0, COLS, gl.SliceLayout(0, s_layout)), GP, BQ)
    i_copy = 0
    for i_flat in range(gl.program_id(0), num_tiles * K, gl.num_programs(0)):
        i_k, t_0, q_0, c_0, n_q, steps, masked = _tile_range(
            i_flat, last_tile, tiles, K, 2 * BQ, BN, BLOCK, STRIDE, PACKED
        )
        total = (steps + 1) // 2 * 2
        n_any = num_visible(q_offset + gl.minimum(t_0 + 2 * BQ, n_q) - 1, BLOCK, STRIDE)
        t_0 += HALF * BQ
        p_row = (q_0 + t_0 + q_token) * H + i_k * G + q_head
        m_row = (t_0 + q_token < n_q) & (q_head < G)
        b_q = gl.load(q_ptr + p_row[:, None] * DK + o_d[None, :], mask=m_row[:, None], other=0.0)
        # Every warp is done with the queries of the last tile.
        _barrier()
        q_s.store(b_q)
        fence_async_shared()
        _barrier()
        b_visible = num_visible(q_offset + t_0 + s_token, BLOCK, STRIDE)
        m_row = (t_0 + s_token < n_q) & (s_head < G)
        p_row = (q_0 + t_0 + s_token) * H + i_k * G + s_head
        b_lse = gl.load(lse_ptr + p_row, mask=m_row, other=float("inf")) * 1.4426950408889634
        i_row = (last_tile - first_tile - i_flat // K).to(gl.int64) * (2 * BQ) + HALF * BQ
        out = (own_ptr, next_ptr, i_row, n_q - t_0, K, i_k, stride_row)
        if total > 0:
            i_s = i_copy % STAGES
            mbarrier.wait(k_full.index(i_s), (i_copy // STAGES) & 1)
            b_s = warpgroup_mma(
                k_s.index(i_s), q_s.permute((1, 0)), zero, use_acc=False, is_async=True
            )
            i_n = (i_copy + 1) % STAGES
            mbarrier.wait(k_full.index(i_n), ((i_copy + 1) // STAGES) & 1)
            b_s = warpgroup_mma_wait(0, deps=(b_s,))
            mbarrier.arrive(k_empty.index(i_s), count=1)
            pairs = (total - (steps - masked) + 1) // 2
            for j in range(pairs):
                b_s = _scores_pair(
                    i_copy + 1, 2 * j + 2 < total, q_s, k_s, k_full, k_empty, b_s, zero, b_lse,
                    (total - 1 - 2 * j) * BN, n_any, b_visible, out, scale_log2,
                    BN, GP, BQ, S, W, STAGES, True,
                )
                i_copy += 2
            for j in range(pairs, total // 2):
                b_s = _scores_pair(
                    i_copy + 1, 2 * j + 2 < total, q_s, k_s, k_full, k_empty, b_s, zero, b_lse,
                    (total - 1 - 2 * j) * BN, n_any, b_visible, out, scale_log2,
                    BN, GP, BQ, S, W, STAGES, False,
                )
                i_copy += 2


@gluon.jit
def hopper_scores_kernel(
    k_desc,
    q_ptr,
    lse_ptr,
    own_ptr,
    next_ptr,
    cu_seqlens_ptr,
    tile_offsets_ptr,
    first_tile,
    num_tiles,
    num_seqs,
    T_q,
    T_c,
    q_offset,
    scale_log2,
    stride_row,
    H: gl.constexpr,
    K: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    DK: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    SELECT: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """Grid: programs that share the tiles of a chunk. Writes what ``block_scores_kernel`` does."""
    S: gl.constexpr = SELECT // STRIDE
    W: gl.constexpr = BLOCK // STRIDE
    BQ: gl.constexpr = BM // GP
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM // 2, DK], k_desc.dtype)
    q_s = gl.allocate_shared_memory(k_desc.dtype, [2, BM // 2, DK], q_shared)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, DK], k_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    fence_async_shared()
    _barrier()
    tiles = (cu_seqlens_ptr, tile_offsets_ptr, num_seqs, T_q, T_c, q_offset)
    last_tile = first_tile + num_tiles - 1
    gl.warp_specialize(
        [
            (_scores_consumer, (tiles, q_ptr, lse_ptr, own_ptr, next_ptr, q_s.index(0), k_s, k_full,
             k_empty, first_tile, last_tile, num_tiles, scale_log2, stride_row, 0, H, K, G, GP, DK,
             BM, BN, BLOCK, STRIDE, S, W, STAGES, PACKED)),
            (_scores_consumer, (tiles, q_ptr, lse_ptr, own_ptr, next_ptr, q_s.index(1), k_s, k_full,
             k_empty, first_tile, last_tile, num_tiles, scale_log2, stride_row, 1, H, K, G, GP, DK,
             BM, BN, BLOCK, STRIDE, S, W, STAGES, PACKED)),
            (_scores_producer, (tiles, k_desc, k_s, k_full, k_empty, last_tile, num_tiles, K, DK,
             BQ, BN, BLOCK, STRIDE, STAGES, PACKED)),
        ],
        [4, 1],
        [240, 24],
    )
