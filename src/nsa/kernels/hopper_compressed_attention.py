"""Compressed attention for Hopper: ``compressed_attention_fwd_kernel`` with overlap.

Triton waits for every product before the softmax that follows it. Here the product with values of
one tile of keys runs while the softmax of the next is taken, and the two warp groups take turns.
Keys are walked from the last to the first, so that masks come first. Keys and values have rings of
their own: keys are free as soon as their product is, values a step later.

Copies do not stop at the last key that a tile sees. What follows has weight 0, so slots that no
sequence uses must be finite. See ``nsa.kernels.hopper_tiles``.
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

from nsa.kernels.hopper_tiles import (
    await_turn,
    barrier,
    barriers,
    exp2,
    fold,
    join_parts,
    pack,
    pass_turn,
    scale_parts,
    take_turns,
    tile_steps,
    token_of_row,
    unpack,
    wide_places,
    widen,
)
from nsa.kernels.tiles import num_visible


@gluon.jit
def _producer(
    tiles,
    ring,
    descriptors,
    num_tiles,
    G: gl.constexpr,
    GP: gl.constexpr,
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
    """Keys of one tile, then the values of the tile before it."""
    q_s, k_s, v_s, bars = ring
    COLUMNS: gl.constexpr = q_s.shape[2]
    PIECES: gl.constexpr = DK // COLUMNS
    q_desc, k_desc, v_desc = descriptors
    q_full, q_empty, full, empty, v_full, v_empty = bars
    K_BYTES: gl.constexpr = PIECES * k_desc.block_type.nbytes
    V_BYTES: gl.constexpr = v_desc.block_type.nbytes
    i_copy = 0
    i_value = 0
    q_phase = 0
    for i_flat in range(gl.program_id(0), num_tiles * K, gl.num_programs(0)):
        i_k, t_0, q_0, c_0, _, _, steps, _ = tile_steps(
            i_flat, num_tiles - 1, tiles, K, BQ, BN, BLOCK, STRIDE, PACKED
        )
        mbarrier.wait(q_empty, q_phase ^ 1)
        mbarrier.expect(q_full, PIECES * q_desc.block_type.nbytes)
        for h in gl.static_range(PIECES):
            tokens = q_s.index(h).reshape([BQ, GP, COLUMNS])
            tma.async_copy_global_to_shared(
                q_desc, [(q_0 + t_0).to(gl.int32), i_k * G, h * COLUMNS], q_full, tokens
            )
        q_phase = q_phase ^ 1
        for j in range(gl.where(steps > 0, steps + 1, 0)):
            row = c_0 + (steps - 1 - j) * BN
            has_k = j < steps
            has_v = j > 0
            i_s = i_copy % STAGES
            mbarrier.wait(empty.index(i_s), ((i_copy // STAGES) & 1) ^ 1, pred=has_k)
            mbarrier.expect(full.index(i_s), K_BYTES, pred=has_k)
            for h in gl.static_range(PIECES):
                place = k_s.index(i_s * PIECES + h)
                tma.async_copy_global_to_shared(
                    k_desc, [row, i_k * DK + h * COLUMNS], full.index(i_s), place, pred=has_k
                )
            i_copy += gl.where(has_k, 1, 0)
            i_v = i_value % STAGES
            mbarrier.wait(v_empty.index(i_v), ((i_value // STAGES) & 1) ^ 1, pred=has_v)
            mbarrier.expect(v_full.index(i_v), V_BYTES, pred=has_v)
            tma.async_copy_global_to_shared(
                v_desc, [row + BN, i_k * DV], v_full.index(i_v), v_s.index(i_v), pred=has_v
            )
            i_value += gl.where(has_v, 1, 0)


@gluon.jit
def _logits(queries, k_s, i_s, zero):
    """Starts the product of queries, a tuple of pieces, with the keys of place ``i_s``."""
    PIECES: gl.constexpr = len(queries)
    b_s = zero
    for h in gl.static_range(PIECES):
        b_k = k_s.index(i_s * PIECES + h).permute((1, 0))
        b_s = warpgroup_mma(queries[h], b_k, b_s, use_acc=h > 0, is_async=True)
    return b_s


@gluon.jit
def _softmax(b_s, b_m, b_l, scale_log2, first_key, b_visible, o_n, MASKED: gl.constexpr):
    """Probabilities of raw logits ``[64, BN]``, new maximum (base 2, scaled), sum and rescaling."""
    if MASKED:
        b_s = gl.where((first_key + o_n)[None, :] < b_visible[:, None], b_s, float("-inf"))
    b_max = join_parts(fold(b_s, MAX=True), b_m, MAX=True)
    b_m_new = gl.maximum(b_m, b_max * scale_log2)
    b_m_safe = b_m_new
    if MASKED:
        # Rows that have seen no key yet keep m = -inf: see ``nsa.kernels.tiles.softmax_step``.
        b_m_safe = gl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = exp2(b_s * scale_log2 - b_m_safe[:, None])
    b_alpha = exp2(b_m - b_m_safe)
    return b_p, b_m_new, scale_parts(b_l, b_alpha) + fold(b_p, MAX=False), b_alpha


@gluon.jit
def _step(
    j,
    steps,
    i_copy,
    ring,
    state,
    zero,
    scale_log2,
    b_visible,
    o_n,
    p_layout: gl.constexpr,
    HALF: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Softmax of tile ``j`` while the product with values of tile ``j - 1`` runs."""
    queries, k_s, v_s, bars = ring
    b_p, b_m, b_l, b_alpha, b_acc = state
    _, _, full, empty, v_full, v_empty = bars
    i_s = i_copy % STAGES
    i_v = (i_copy - 1) % STAGES
    i_n = (i_copy + 1) % STAGES
    await_turn(HALF)
    b_s = _logits(queries, k_s, i_s, zero)
    b_acc = b_acc * gl.convert_layout(b_alpha, gl.SliceLayout(1, b_acc.type.layout))[:, None]
    mbarrier.wait(v_full.index(i_v), ((i_copy - 1) // STAGES) & 1)
    b_acc = warpgroup_mma(unpack(b_p, v_s.dtype, p_layout), v_s.index(i_v), b_acc, is_async=True)
    pass_turn(HALF)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    b_e, b_m, b_l, b_alpha = _softmax(
        b_s, b_m, b_l, scale_log2, (steps - 1 - j) * BN, b_visible, o_n, MASKED
    )
    # The waits for copies keep ptxas from moving those for products up, before the exponentials.
    mbarrier.arrive(empty.index(i_s), count=1)
    mbarrier.wait(full.index(i_n), ((i_copy + 1) // STAGES) & 1, pred=j + 1 < steps)
    b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
    mbarrier.arrive(v_empty.index(i_v), count=1)
    return pack(b_e, v_s.dtype), b_m, b_l, b_alpha, b_acc


@gluon.jit
def _consumer(
    tiles,
    ring,
    out,
    num_tiles,
    ROW: gl.constexpr,
    H: gl.constexpr,
    K: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    DV: gl.constexpr,
    BQ: gl.constexpr,
    BN: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """One warp group: rows ``ROW`` to ``ROW + 64`` of every tile."""
    q_s, k_s, v_s, bars = ring
    o_ptr, lse_ptr, scale_log2 = out
    q_full, q_empty, full, empty, v_full, v_empty = bars
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    zero = gl.zeros([64, BN], gl.float32, s_layout)
    o_n = gl.arange(0, BN, gl.SliceLayout(0, s_layout))
    o_m = ROW + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    HALF: gl.constexpr = ROW // 64
    PIECES: gl.constexpr = q_s.shape[0]
    queries = ()
    for h in gl.static_range(PIECES):
        queries = queries + (q_s.index(h).slice(ROW, 64),)
    take_turns(HALF)
    i_copy = 0
    q_phase = 0
    for i_flat in range(gl.program_id(0), num_tiles * K, gl.num_programs(0)):
        i_k, t_0, q_0, _, n_q, _, steps, masked = tile_steps(
            i_flat, num_tiles - 1, tiles, K, BQ, BN, BLOCK, STRIDE, PACKED
        )
        o_t = t_0 + token_of_row(o_m, G, GP)
        b_visible = num_visible(tiles[4] + o_t, BLOCK, STRIDE)
        b_m = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        b_l = fold(zero, MAX=False)
        b_acc = gl.zeros([64, DV], gl.float32, o_layout)
        mbarrier.wait(q_full, q_phase)
        q_phase = q_phase ^ 1
        if steps > 0:
            i_s = i_copy % STAGES
            mbarrier.wait(full.index(i_s), (i_copy // STAGES) & 1)
            await_turn(HALF)
            b_s = _logits(queries, k_s, i_s, zero)
            pass_turn(HALF)
            b_s = warpgroup_mma_wait(0, deps=(b_s,))
            mbarrier.arrive(empty.index(i_s), count=1)
            b_e, b_m, b_l, b_alpha = _softmax(
                b_s, b_m, b_l, scale_log2, (steps - 1) * BN, b_visible, o_n, True
            )
            b_p = pack(b_e, q_s.dtype)
            i_copy += 1
            mbarrier.wait(full.index(i_copy % STAGES), (i_copy // STAGES) & 1, pred=steps > 1)
            mine = (queries, k_s, v_s, bars)
            state = (b_p, b_m, b_l, b_alpha, b_acc)
            for j in range(1, masked):
                state = _step(
                    j, steps, i_copy, mine, state, zero, scale_log2, b_visible, o_n, p_layout,
                    HALF, BN, STAGES, True
                )  # fmt: skip
                i_copy += 1
            for j in range(gl.maximum(masked, 1), steps):
                state = _step(
                    j, steps, i_copy, mine, state, zero, scale_log2, b_visible, o_n, p_layout,
                    HALF, BN, STAGES, False
                )  # fmt: skip
                i_copy += 1
            b_p, b_m, b_l, b_alpha, b_acc = state
            mbarrier.arrive(q_empty, count=1)
            i_v = (i_copy - 1) % STAGES
            mbarrier.wait(v_full.index(i_v), ((i_copy - 1) // STAGES) & 1)
            b_o = b_acc * gl.convert_layout(b_alpha, row_layout)[:, None]
            b_o = warpgroup_mma(
                unpack(b_p, q_s.dtype, p_layout), v_s.index(i_v), b_o, is_async=True
            )
            b_o = warpgroup_mma_wait(0, deps=(b_o,))
            mbarrier.arrive(v_empty.index(i_v), count=1)
        else:
            b_o = b_acc
            mbarrier.arrive(q_empty, count=1)
        b_l = join_parts(b_l, b_m, MAX=False)
        p_row = (q_0 + o_t) * H + i_k * G + o_m % GP
        gl.store(lse_ptr + p_row, (b_m + gl.log2(b_l)) * 0.6931471805599453, mask=o_t < n_q)
        b_inv = 1.0 / gl.where(b_l == 0.0, 1.0, b_l)
        b_o = b_o * gl.convert_layout(b_inv, row_layout)[:, None]
        p_o, m_o = wide_places(p_row, o_t < n_q, DV // 2, DV // 2)
        gl.store(o_ptr + p_o, widen(pack(b_o, q_s.dtype)), mask=m_o)


@gluon.jit(do_not_specialize=["num_tiles", "num_seqs", "T_q", "T_c", "q_offset"])
def hopper_attention_fwd_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    num_tiles,
    num_seqs,
    T_q,
    T_c,
    q_offset,
    scale_log2,
    H: gl.constexpr,
    K: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    DK: gl.constexpr,
    DV: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """Grid: programs that share ``num_tiles * K`` tiles. ``o [T, H, DV]``, ``lse [T, H]``.

    Descriptors: ``q [T, H, DK]`` by ``[BM / GP, GP, COLUMNS]``, ``k [slots, K * DK]`` by
    ``[BN, COLUMNS]``, ``v [slots, K * DV]`` by ``[BN, DV]``. Queries and keys whose dim is no power
    of two, as shared memory must be shaped, come in pieces of ``COLUMNS``.
    """
    BQ: gl.constexpr = BM // GP
    COLUMNS: gl.constexpr = k_desc.block_shape[1]
    PIECES: gl.constexpr = DK // COLUMNS
    q_s = gl.allocate_shared_memory(q_desc.dtype, [PIECES, BM, COLUMNS], k_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES * PIECES, BN, COLUMNS], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BN, DV], v_desc.layout)
    q_full, q_empty = barriers(1, 1).index(0), barriers(1, 2).index(0)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    fence_async_shared()
    barrier()
    bars = (q_full, q_empty, full, empty, v_full, v_empty)
    tiles = (cu_seqlens_ptr, num_seqs, T_q, T_c, q_offset)
    ring = (q_s, k_s, v_s, bars)
    out = (o_ptr.to(gl.pointer_type(gl.int32)), lse_ptr, scale_log2)  # Written as pairs.
    gl.warp_specialize(
        [
            (_consumer, (
                tiles, ring, out, num_tiles, 0, H, K, G, GP, DV, BQ, BN, BLOCK, STRIDE, STAGES,
                PACKED
            )),
            (_consumer, (
                tiles, ring, out, num_tiles, 64, H, K, G, GP, DV, BQ, BN, BLOCK, STRIDE, STAGES,
                PACKED
            )),
            (_producer, (
                tiles, ring, (q_desc, k_desc, v_desc), num_tiles, G, GP, K, DK, DV, BQ, BN, BLOCK,
                STRIDE, STAGES, PACKED
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
