"""Attention to selected blocks and window for Hopper: ``token_attention_fwd_kernel`` with overlap.

A program has a warp that copies tiles of 64 keys into a ring and two warp groups, each with its own
half of the query tile. They share the ring: the copies are those of the union of both halves, since
reading keys from L2 for each half alone would take longer than the products. A warp group gives a
tile back unread when none of its tokens chose the block.

Per branch, keys are walked so that those that need a mask come first. Of whole blocks a row sees
all or nothing, which costs one value per row: its maximum stays and what is subtracted is infinite.

What copies bring from beyond the last key that a tile sees has weight 0, so it must be finite.
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

from nsa.kernels.hopper_tiles import barrier, exp2, pack, unpack
from nsa.kernels.tiles import locate_tile

BN = gl.constexpr(64)  # Keys of a tile: a selection block.
# Below every logit, yet finite: the difference of two is 0.
LOWEST = gl.constexpr(-3.0e38)

# Entries of SHAPE, the sizes that are compiled in.
H = gl.constexpr(0)
K = gl.constexpr(1)
G = gl.constexpr(2)
DK = gl.constexpr(3)
DV = gl.constexpr(4)
WINDOW = gl.constexpr(5)
U = gl.constexpr(6)
STAGES = gl.constexpr(7)
SLC = gl.constexpr(8)
ALL = gl.constexpr(9)
WIN = gl.constexpr(10)
COMBINE = gl.constexpr(11)
SAVE = gl.constexpr(12)
PACKED = gl.constexpr(13)


@gluon.jit
def _locate(i_flat, tiles, SHAPE: gl.constexpr):
    """Tile, kv head, first token, first rows of q and k, queries, positions of first and last.

    One kv head after the other, so that what is read at one time fits L2.
    """
    group: gl.constexpr = SHAPE[G]
    packed: gl.constexpr = SHAPE[PACKED]
    cu_seqlens_ptr, tile_offsets_ptr, num_tiles, num_seqs, T_q, T_k, q_offset = tiles
    i_tile = num_tiles - 1 - i_flat % num_tiles
    t_0, q_0, k_0, _, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, tile_offsets_ptr, num_seqs, T_q, T_k, 0, 128 // group, 1, packed
    )
    last = q_offset + gl.minimum(t_0 + 128 // group, n_q) - 1
    return i_tile, i_flat // num_tiles, t_0, q_0, k_0.to(gl.int32), n_q, q_offset + t_0, last


@gluon.jit
def _chosen(p_tile, lists, last, exists, SHAPE: gl.constexpr):
    """Steps of the selected branch."""
    if SHAPE[ALL]:
        count = gl.where(exists, last // BN + 1, 0)
    else:
        count = gl.load(lists[2] + p_tile)
    return count


@gluon.jit
def _ages(start, last, exists, SHAPE: gl.constexpr):
    """Window of a tile: first key, steps, how many of the last and of all need a mask."""
    window: gl.constexpr = SHAPE[WINDOW]
    first = gl.maximum(start - window + 1, 0)
    steps = gl.where(exists, (last - first) // BN + 1, 0)
    late = steps - gl.minimum((start - first + 1) // BN, steps)
    early = gl.maximum(last - window + BN - first, 0) // BN
    return first, steps, late, gl.minimum(late + early, steps)


@gluon.jit
def _key(branch, j, steps, late, first, p_tile, lists, SHAPE: gl.constexpr):
    """Position of the first key of step ``j``."""
    i = j + steps - late
    key = first + gl.where(i >= steps, i - steps, i) * BN
    if SHAPE[SLC]:
        u = gl.maximum(steps - 1 - j, 0)
        if SHAPE[ALL]:
            block = u
        else:
            block = gl.load(lists[0] + p_tile * SHAPE[U] + u, mask=branch == 0, other=0)
        key = gl.where(branch == 0, block * BN, key)
    return key


@gluon.jit
def _word(branch, j, steps, p_tile, lists, SHAPE: gl.constexpr):
    """Bit ``q`` says whether token ``q`` of the tile takes part in step ``j``."""
    if SHAPE[ALL] or not SHAPE[SLC]:
        word = gl.to_tensor(-1)
    else:
        p = lists[1] + p_tile * (SHAPE[U] + 1) + gl.maximum(steps - 1 - j, 0)
        word = gl.load(p + 1, mask=branch == 0, other=-1) - gl.load(p, mask=branch == 0, other=0)
        word = word.to(gl.int32)
    return word


@gluon.jit
def _producer(
    tiles, lists, q_desc, k_slc, v_slc, k_win, v_win, memory, bars, SHAPE: gl.constexpr
):  # fmt: skip
    group: gl.constexpr = SHAPE[G]
    stages: gl.constexpr = SHAPE[STAGES]
    BYTES: gl.constexpr = k_slc.block_type.nbytes + v_slc.block_type.nbytes
    q_s, k_s, v_s = memory
    q_full, q_empty, full, empty = bars
    i_copy = 0
    q_phase = 0
    for i_flat in range(gl.program_id(0), tiles[2] * SHAPE[K], gl.num_programs(0)):
        i_tile, i_k, t_0, q_0, k_0, n_q, start, last = _locate(i_flat, tiles, SHAPE)
        p_tile = (i_tile * SHAPE[K] + i_k).to(gl.int64)
        mbarrier.wait(q_empty, q_phase ^ 1)
        mbarrier.expect(q_full, q_desc.block_type.nbytes)
        row = (q_0 + t_0).to(gl.int32)
        tma.async_copy_global_to_shared(q_desc, [row, i_k * group, 0], q_full, q_s)
        q_phase = q_phase ^ 1
        if SHAPE[SLC]:
            steps = _chosen(p_tile, lists, last, t_0 < n_q, SHAPE)
            key = _key(0, 0, steps, 0, 0, p_tile, lists, SHAPE)
            for j in range(steps):
                following = _key(0, j + 1, steps, 0, 0, p_tile, lists, SHAPE)
                i_s = i_copy % stages
                bar = full.index(i_s)
                mbarrier.wait(empty.index(i_s), ((i_copy // stages) & 1) ^ 1)
                mbarrier.expect(bar, BYTES)
                tma.async_copy_global_to_shared(
                    k_slc, [k_0 + key, i_k * SHAPE[DK]], bar, k_s.index(i_s)
                )
                tma.async_copy_global_to_shared(
                    v_slc, [k_0 + key, i_k * SHAPE[DV]], bar, v_s.index(i_s)
                )
                key = following
                i_copy += 1
        if SHAPE[WIN]:
            first, steps, late, _ = _ages(start, last, t_0 < n_q, SHAPE)
            for j in range(steps):
                i = j + steps - late
                key = k_0 + first + gl.where(i >= steps, i - steps, i) * BN
                i_s = i_copy % stages
                bar = full.index(i_s)
                mbarrier.wait(empty.index(i_s), ((i_copy // stages) & 1) ^ 1)
                mbarrier.expect(bar, BYTES)
                tma.async_copy_global_to_shared(k_win, [key, i_k * SHAPE[DK]], bar, k_s.index(i_s))
                tma.async_copy_global_to_shared(v_win, [key, i_k * SHAPE[DV]], bar, v_s.index(i_s))
                i_copy += 1


@gluon.jit
def _here(x):
    """``x``; keeps addresses made of it from being computed ahead of the loops and spilled."""
    return gl.inline_asm_elementwise(
        "mov.b64 $0, $1;", "=l,l", [x], dtype=gl.int64, is_pure=False, pack=1
    )


@gluon.jit
def _softmax(b_s, b_m, b_l, scale_log2, b_in, b_age, o_n, reach, MASKED: gl.constexpr):
    """Probabilities of raw logits ``[64, BN]``, new maximum (base 2, scaled), sum and rescaling.

    ``b_in`` says which rows take part, ``b_age`` how far they are from the first key; with a mask
    they see keys of ages from 0 to ``reach - 1``.
    """
    if MASKED:
        age = (b_age[:, None] - o_n[None, :]).to(gl.uint32, bitcast=True)
        b_s = gl.where(age < reach.to(gl.uint32, bitcast=True), b_s, float("-inf"))
    b_m_new = gl.maximum(b_m, gl.where(b_in, gl.max(b_s, 1) * scale_log2, LOWEST))
    b_sub = gl.where(b_in, b_m_new, float("inf"))
    b_p = exp2(b_s * scale_log2 - b_sub[:, None])
    b_alpha = exp2(b_m - b_m_new)
    return b_p, b_m_new, b_l * b_alpha + gl.sum(b_p, 1), b_alpha


@gluon.jit
def _needed(mine, behind, stages: gl.constexpr):
    """Whether to work on a tile: one that is ours, or that must be since values wait too long.

    The values of the tile before, ``behind`` tiles ago, keep their place of the ring until the next
    step. Were more tiles passed over than the ring has, the copy would wait for us, and we for it.
    """
    return (mine != 0) | (behind >= stages - 2)


@gluon.jit
def _step(
    i_copy, i_v, i_free, more, b_q, memory, bars, b_p, b_m, b_l, b_alpha, b_acc, scale_log2, b_in,
    b_age, o_n, reach, SHAPE: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """Softmax of the tile in place ``i_copy`` while the product with values of ``i_v`` runs."""
    _, k_s, v_s = memory
    _, _, full, empty = bars
    stages: gl.constexpr = SHAPE[STAGES]
    half: gl.constexpr = k_s.dtype
    zero = gl.zeros([64, BN], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16]))
    k = k_s.index(i_copy % stages).permute((1, 0))
    b_s = warpgroup_mma(b_q, k, zero, use_acc=False, is_async=True)
    b_acc = b_acc * gl.convert_layout(b_alpha, gl.SliceLayout(1, b_acc.type.layout))[:, None]
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_acc.type.layout, 2)
    b_acc = warpgroup_mma(
        unpack(b_p, half, p_layout), v_s.index(i_v % stages), b_acc, is_async=True
    )
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    b_e, b_m, b_l, b_alpha = _softmax(b_s, b_m, b_l, scale_log2, b_in, b_age, o_n, reach, MASKED)
    # As in ``nsa.kernels.hopper_forward``: given back late, next to the wait for the next copy.
    mbarrier.arrive(empty.index(gl.maximum(i_free, 0) % stages), count=1, pred=i_free >= 0)
    mbarrier.wait(full.index((i_copy + 1) % stages), ((i_copy + 1) // stages) & 1, pred=more)
    b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
    return pack(b_e, half), b_m, b_l, b_alpha, b_acc


@gluon.jit
def _consumer(
    ROW: gl.constexpr, tiles, lists, gates_ptr, o_cmp_ptr, outs, memory, bars, scale_log2,
    SHAPE: gl.constexpr, Q_REGISTERS: gl.constexpr
):  # fmt: skip
    """One warp group: rows ``ROW`` to ``ROW + 64`` of every tile."""
    group: gl.constexpr = SHAPE[G]
    heads: gl.constexpr = SHAPE[H]
    dim: gl.constexpr = SHAPE[DV]
    key_dim: gl.constexpr = SHAPE[DK]
    stages: gl.constexpr = SHAPE[STAGES]
    MINE: gl.constexpr = ((1 << (64 // group)) - 1) << (ROW // group)
    FROM: gl.constexpr = 0 if SHAPE[SLC] else 1
    TO: gl.constexpr = 2 if SHAPE[WIN] else 1
    o_ptr, o_slc_ptr, o_win_ptr, lse_slc_ptr, lse_win_ptr = outs
    q_s, k_s, v_s = memory
    q_full, q_empty, full, empty = bars
    half: gl.constexpr = k_s.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    zero = gl.zeros([64, BN], gl.float32, s_layout)
    o_n = gl.arange(0, BN, gl.SliceLayout(0, s_layout))
    o_m = ROW + gl.arange(0, 64, rows)
    o_d = gl.arange(0, dim, gl.SliceLayout(0, o_layout))
    q_mine = q_s.reshape([128, key_dim]).slice(ROW, 64)
    i_copy = 0
    q_phase = 0
    for i_flat in range(gl.program_id(0), tiles[2] * SHAPE[K], gl.num_programs(0)):
        i_tile, i_k, t_0, q_0, _, n_q, start, last = _locate(i_flat, tiles, SHAPE)
        p_tile = (i_tile * SHAPE[K] + i_k).to(gl.int64)
        o_t = t_0 + o_m // group
        p_row = (q_0 + o_t) * heads + i_k * group + o_m % group
        first, num_win, late, masked_win = _ages(start, last, t_0 < n_q, SHAPE)
        if SHAPE[SLC]:
            num_slc = _chosen(p_tile, lists, last, t_0 < n_q, SHAPE)
            masked_slc = 0
            # Blocks ascend; those that end behind the first query are the last.
            ends = _key(0, 0, num_slc, 0, 0, p_tile, lists, SHAPE) + BN - 1
            while (masked_slc < num_slc) & (ends > start):
                masked_slc += 1
                ends = _key(0, masked_slc, num_slc, 0, 0, p_tile, lists, SHAPE) + BN - 1
        mbarrier.wait(q_full, q_phase)
        q_phase = q_phase ^ 1
        if Q_REGISTERS:
            b_q = q_mine.load(gl.DotOperandLayout(0, s_layout, 2))
            mbarrier.arrive(q_empty, count=1)
        else:
            b_q = q_mine
        for branch in range(FROM, TO):
            steps = num_win
            masked = masked_win
            reach = gl.to_tensor(SHAPE[WINDOW])
            if SHAPE[SLC]:
                steps = gl.where(branch == 0, num_slc, steps)
                masked = gl.where(branch == 0, masked_slc, masked)
                reach = gl.where(branch == 0, 0x7FFFFFFF, reach)
            b_m = gl.full([64], LOWEST, gl.float32, rows)
            b_l = gl.zeros([64], gl.float32, rows)
            b_acc = gl.zeros([64, dim], gl.float32, o_layout)
            end = i_copy + steps
            word = _word(branch, 0, steps, p_tile, lists, SHAPE)
            mbarrier.wait(full.index(i_copy % stages), (i_copy // stages) & 1, pred=steps > 0)
            j = 0
            while (j < steps) & ((word & MINE) == 0):
                mbarrier.arrive(empty.index(i_copy % stages), count=1)
                j += 1
                i_copy += 1
                word = _word(branch, j, steps, p_tile, lists, SHAPE)
                mbarrier.wait(full.index(i_copy % stages), (i_copy // stages) & 1, pred=j < steps)
            if j < steps:
                key = _key(branch, j, steps, late, first, p_tile, lists, SHAPE)
                b_in = ((word >> (o_m // group)) & 1) != 0
                k = k_s.index(i_copy % stages).permute((1, 0))
                b_s = warpgroup_mma(b_q, k, zero, use_acc=False, is_async=True)
                b_s = warpgroup_mma_wait(0, deps=(b_s,))
                b_e, b_m, b_l, b_alpha = _softmax(
                    b_s, b_m, b_l, scale_log2, b_in, start - t_0 + o_t - key, o_n, reach, True
                )
                b_p = pack(b_e, half)
                i_free = -1
                i_v = i_copy
                j += 1
                i_copy += 1
                word = _word(branch, j, steps, p_tile, lists, SHAPE)
                mbarrier.wait(full.index(i_copy % stages), (i_copy // stages) & 1, pred=j < steps)
                for j in range(steps - (end - i_copy), masked):
                    following = _word(branch, j + 1, steps, p_tile, lists, SHAPE)
                    more = j + 1 < steps
                    if _needed(word & MINE, i_copy - i_v, stages):
                        key = _key(branch, j, steps, late, first, p_tile, lists, SHAPE)
                        b_in = ((word >> (o_m // group)) & 1) != 0
                        b_p, b_m, b_l, b_alpha, b_acc = _step(
                            i_copy, i_v, i_free, more, b_q, memory, bars, b_p, b_m, b_l, b_alpha,
                            b_acc, scale_log2, b_in, start - t_0 + o_t - key, o_n, reach, SHAPE,
                            True
                        )  # fmt: skip
                        i_free = i_v
                        i_v = i_copy
                    else:
                        mbarrier.arrive(
                            empty.index(gl.maximum(i_free, 0) % stages), pred=i_free >= 0
                        )
                        i_free = -1
                        mbarrier.arrive(empty.index(i_copy % stages), count=1)
                        mbarrier.wait(
                            full.index((i_copy + 1) % stages), ((i_copy + 1) // stages) & 1, more
                        )
                    i_copy += 1
                    word = following
                for j in range(steps - (end - i_copy), steps):
                    following = _word(branch, j + 1, steps, p_tile, lists, SHAPE)
                    more = j + 1 < steps
                    if _needed(word & MINE, i_copy - i_v, stages):
                        b_in = ((word >> (o_m // group)) & 1) != 0
                        b_p, b_m, b_l, b_alpha, b_acc = _step(
                            i_copy, i_v, i_free, more, b_q, memory, bars, b_p, b_m, b_l, b_alpha,
                            b_acc, scale_log2, b_in, o_t, o_n, reach, SHAPE, False
                        )  # fmt: skip
                        i_free = i_v
                        i_v = i_copy
                    else:
                        mbarrier.arrive(
                            empty.index(gl.maximum(i_free, 0) % stages), pred=i_free >= 0
                        )
                        i_free = -1
                        mbarrier.arrive(empty.index(i_copy % stages), count=1)
                        mbarrier.wait(
                            full.index((i_copy + 1) % stages), ((i_copy + 1) // stages) & 1, more
                        )
                    i_copy += 1
                    word = following
                mbarrier.arrive(empty.index(gl.maximum(i_free, 0) % stages), pred=i_free >= 0)
                b_o = b_acc * gl.convert_layout(b_alpha, o_rows)[:, None]
                b_o = warpgroup_mma(
                    unpack(b_p, half, p_layout), v_s.index(i_v % stages), b_o, is_async=True
                )
                b_o = warpgroup_mma_wait(0, deps=(b_o,))
                mbarrier.arrive(empty.index(i_v % stages), count=1)
            else:
                b_o = b_acc
            b_inv = 1.0 / gl.where(b_l == 0.0, 1.0, b_l)
            b_o = b_o * gl.convert_layout(b_inv, o_rows)[:, None]
            p_o = _here(gl.convert_layout(p_row, o_rows))[:, None] * dim + o_d[None, :]
            m_o = (gl.convert_layout((o_t < n_q).to(gl.int32), o_rows) != 0)[:, None]
            if SHAPE[SAVE]:
                lse = (b_m + gl.log2(b_l)) * 0.6931471805599453
                if branch == 0:
                    gl.store(o_slc_ptr + p_o, b_o.to(half), mask=m_o)
                    gl.store(lse_slc_ptr + p_row, lse, mask=o_t < n_q)
                else:
                    gl.store(o_win_ptr + p_o, b_o.to(half), mask=m_o)
                    gl.store(lse_win_ptr + p_row, lse, mask=o_t < n_q)
            elif branch == 0:
                # Kept in memory while the window runs.
                gl.store(o_ptr + p_o, b_o.to(half), mask=m_o)
            if SHAPE[COMBINE] and branch == 1:
                p_slc = o_slc_ptr if SHAPE[SAVE] else o_ptr
                p_gate = gates_ptr + gl.convert_layout(p_row, o_rows) * 3
                m_g = gl.convert_layout((o_t < n_q).to(gl.int32), o_rows) != 0
                b_g = gl.load(p_gate + 2, mask=m_g, other=0.0).to(gl.float32)
                b_o = b_o * b_g[:, None]
                b_g = gl.load(p_gate, mask=m_g, other=0.0).to(gl.float32)
                b_x = gl.load(o_cmp_ptr + p_o, mask=m_o, other=0.0).to(gl.float32)
                b_o += b_g[:, None] * b_x
                # Each thread reads back what it wrote itself.
                b_g = gl.load(p_gate + 1, mask=m_g, other=0.0).to(gl.float32)
                b_x = gl.load(p_slc + p_o, mask=m_o, other=0.0).to(gl.float32)
                b_o += b_g[:, None] * b_x
                gl.store(o_ptr + p_o, b_o.to(half), mask=m_o)
        if not Q_REGISTERS:
            mbarrier.arrive(q_empty, count=1)


@gluon.jit
def hopper_token_attention_fwd_kernel(
    q_desc,
    k_slc_desc,
    v_slc_desc,
    k_win_desc,
    v_win_desc,
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
    tile_offsets_ptr,
    num_tiles,
    num_seqs,
    T_q,
    T_k,
    q_offset,
    scale_log2,
    SHAPE: gl.constexpr,
    Q_REGISTERS: gl.constexpr,
):
    """Grid: programs that share ``num_tiles * K`` tiles of 128 rows.

    Descriptors: ``q [T, H, DK]`` by ``[128 / G, G, DK]``, keys ``[T, K * DK]`` by ``[64, DK]``,
    values alike. Union lists are those of the tiles.
    """
    stages: gl.constexpr = SHAPE[STAGES]
    key_dim: gl.constexpr = SHAPE[DK]
    dim: gl.constexpr = SHAPE[DV]
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_shape, q_desc.layout)
    k_s = gl.allocate_shared_memory(k_slc_desc.dtype, [stages, BN, key_dim], k_slc_desc.layout)
    v_s = gl.allocate_shared_memory(v_slc_desc.dtype, [stages, BN, dim], v_slc_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], bar)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(stages):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    barrier()
    memory = (q_s, k_s, v_s)
    bars = (q_full, q_empty, full, empty)
    tiles = (cu_seqlens_ptr, tile_offsets_ptr, num_tiles, num_seqs, T_q, T_k, q_offset)
    lists = (blocks_ptr, bits_ptr, counts_ptr)
    outs = (o_ptr, o_slc_ptr, o_win_ptr, lse_slc_ptr, lse_win_ptr)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    0, tiles, lists, gates_ptr, o_cmp_ptr, outs, memory, bars, scale_log2, SHAPE,
                    Q_REGISTERS,
                ),
            ),
            (
                _consumer,
                (
                    64, tiles, lists, gates_ptr, o_cmp_ptr, outs, memory, bars, scale_log2, SHAPE,
                    Q_REGISTERS,
                ),
            ),
            (
                _producer,
                (
                    tiles, lists, q_desc, k_slc_desc, v_slc_desc, k_win_desc, v_win_desc, memory,
                    bars, SHAPE,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
