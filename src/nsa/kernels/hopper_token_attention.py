"""Attention to selected blocks and window for Hopper: ``token_attention_fwd_kernel`` with overlap.

A program has a warp that copies tiles of 64 keys into a ring and two warp groups, each with its own
half of the query tile. They share the ring: the copies are those of the union of both halves, since
reading keys from L2 for each half alone would take longer than the products. A warp group gives a
tile back unread when none of its tokens chose the block.

The product with values of one tile runs while the softmax of the next is taken. Of whole blocks a
row sees all or nothing, which costs one value per row: its maximum stays and what is subtracted is
infinite.

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

from nsa.kernels.hopper_tiles import (
    alike,
    barrier,
    barriers,
    exp2,
    floats,
    fold,
    join_parts,
    pack,
    pack_pair,
    rescale,
    same,
    scale_parts,
    token_of_row,
    tokens_of,
    union_entry,
    unlike,
    unpack,
    wide_places,
    widen,
)
from nsa.kernels.tiles import locate_tile

BM = gl.constexpr(128)  # Query rows of a tile: 64 for each warp group.
BN = gl.constexpr(64)  # Keys of a step: a selection block.
# Below every logit, yet finite: the difference of two is 0.
LOWEST = gl.constexpr(-3.0e38)
# How far, as a power of two, a logit may exceed what is subtracted before the exponential.
SLACK = gl.constexpr(8.0)

# Entries of SHAPE, what is compiled in.
G = gl.constexpr(0)
DK = gl.constexpr(1)
DV = gl.constexpr(2)
COLUMNS = gl.constexpr(3)  # Of keys and queries, a piece in shared memory: a divisor of DK.
STAGES = gl.constexpr(4)
SLC = gl.constexpr(5)
ALL = gl.constexpr(6)
WIN = gl.constexpr(7)
COMBINE = gl.constexpr(8)
SAVE = gl.constexpr(9)
PACKED = gl.constexpr(10)
GP = gl.constexpr(11)  # Rows of a token: a power of two, G or the next.


@gluon.jit
def _locate(i_flat, tiles, SHAPE: gl.constexpr):
    """Kv head, first token, first rows of q and k, queries, positions of first and last, list.

    One kv head after the other, so that what is read at one time fits L2.
    """
    tokens: gl.constexpr = BM // SHAPE[GP]
    packed: gl.constexpr = SHAPE[PACKED]
    cu_seqlens_ptr, num_tiles, num_seqs, K, T_q, T_k, q_offset, _ = tiles
    i_tile = num_tiles - 1 - i_flat % num_tiles
    i_k = i_flat // num_tiles
    t_0, q_0, k_0, _, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, num_seqs, T_q, T_k, 0, tokens, 1, packed
    )
    last = q_offset + gl.minimum(t_0 + tokens, n_q) - 1
    i_list = (i_tile * K + i_k).to(gl.int64)
    return i_k, t_0, q_0, k_0.to(gl.int32), n_q, q_offset + t_0, last, i_list


@gluon.jit
def _count(i_list, lists, SHAPE: gl.constexpr):
    """Blocks of the tile's list, where there is one."""
    if SHAPE[SLC] and not SHAPE[ALL]:
        return gl.load(lists[2] + i_list).to(gl.int32)
    else:
        return gl.to_tensor(0)


@gluon.jit
def _range(branch, place, chosen, tiles, SHAPE: gl.constexpr):
    """First key of a branch (of all blocks or the window) and its steps."""
    _k, t_0, _q, _t, n_q, start, last, _list = place
    exists = t_0 < n_q
    first = gl.where(branch == 0, 0, gl.maximum(start - tiles[7] + 1, 0))
    steps = gl.where(exists, (last - first) // BN + 1, 0)
    if SHAPE[SLC] and not SHAPE[ALL]:
        steps = gl.where(branch == 0, chosen, steps)
    return first, steps


@gluon.jit
def _entry(branch, j, steps, i_list, lists, SHAPE: gl.constexpr):
    """Entry ``j`` of the tile's list where there is one: see ``union_entry``."""
    blocks_ptr, bits_ptr, _, width = lists
    if SHAPE[SLC] and not SHAPE[ALL]:
        return union_entry(j, gl.where(branch == 0, steps, 0), i_list, blocks_ptr, bits_ptr, width)
    else:
        return gl.to_tensor(0), gl.to_tensor(0).to(gl.int64)


@gluon.jit
def _keys(branch, j, first, entry, seen, SHAPE: gl.constexpr):
    """First key of step ``j``, and a bit for each token of the tile that takes part in it."""
    key = first + j * BN
    word = gl.to_tensor(-1)
    if SHAPE[SLC] and not SHAPE[ALL]:
        key = gl.where(branch == 0, entry[0].to(gl.int32) * BN, key)
        word = gl.where(branch == 0, tokens_of(entry, seen), word)
    return key, word


@gluon.jit
def _copy(i_copy, row, i_k, k_desc, v_desc, memory, bars, SHAPE: gl.constexpr):
    """Starts the copies of 64 keys and values from ``row`` into the next place of the ring."""
    _, k_s, v_s = memory
    _, _, full, empty = bars
    stages: gl.constexpr = SHAPE[STAGES]
    columns: gl.constexpr = SHAPE[COLUMNS]
    pieces: gl.constexpr = SHAPE[DK] // columns
    i_s = i_copy % stages
    bar = full.index(i_s)
    mbarrier.wait(empty.index(i_s), ((i_copy // stages) & 1) ^ 1)
    mbarrier.expect(bar, k_desc.block_type.nbytes * pieces + v_desc.block_type.nbytes)
    for h in gl.static_range(pieces):
        tma.async_copy_global_to_shared(
            k_desc, [row, i_k * SHAPE[DK] + h * columns], bar, k_s.index(i_s * pieces + h)
        )
    tma.async_copy_global_to_shared(v_desc, [row, i_k * SHAPE[DV]], bar, v_s.index(i_s))


@gluon.jit
def _producer(tiles, lists, q_desc, keys, memory, bars, SHAPE: gl.constexpr):
    columns: gl.constexpr = SHAPE[COLUMNS]
    pieces: gl.constexpr = SHAPE[DK] // columns
    k_slc, v_slc, k_win, v_win = keys
    q_s, _k_s, _v_s = memory
    q_full, q_empty, _full, _empty = bars
    i_copy = 0
    q_phase = 0
    for i_flat in range(gl.program_id(0), tiles[1] * tiles[3], gl.num_programs(0)):
        place = _locate(i_flat, tiles, SHAPE)
        i_k, t_0, q_0, k_0, _n, _start, _last, i_list = place
        mbarrier.wait(q_empty, q_phase ^ 1)
        mbarrier.expect(q_full, q_desc.block_type.nbytes * pieces)
        row = (q_0 + t_0).to(gl.int32)
        for h in gl.static_range(pieces):
            tma.async_copy_global_to_shared(
                q_desc, [row, i_k * SHAPE[G], h * columns], q_full, q_s.index(h)
            )
        q_phase = q_phase ^ 1
        if SHAPE[SLC]:
            first, steps = _range(0, place, _count(i_list, lists, SHAPE), tiles, SHAPE)
            entry = _entry(0, 0, steps, i_list, lists, SHAPE)
            for j in range(steps):
                following = _entry(0, j + 1, steps, i_list, lists, SHAPE)
                key, _word = _keys(0, j, first, entry, entry[1], SHAPE)
                _copy(i_copy, k_0 + key, i_k, k_slc, v_slc, memory, bars, SHAPE)
                entry = following
                i_copy += 1
        if SHAPE[WIN]:
            first, steps = _range(1, place, 0, tiles, SHAPE)
            for j in range(steps):
                _copy(i_copy, k_0 + first + j * BN, i_k, k_win, v_win, memory, bars, SHAPE)
                i_copy += 1


@gluon.jit
def _here(x):
    """``x``; keeps addresses made of it from being computed ahead of the loops and spilled."""
    return gl.inline_asm_elementwise(
        "mov.b64 $0, $1;", "=l,l", [x], dtype=gl.int64, is_pure=False, pack=1
    )


@gluon.jit
def _step(
    i_copy, i_v, i_free, more, b_q, memory, bars, b_p, b_m, b_l, b_alpha, b_acc, scale_log2, b_in,
    b_age, reach, masked, SHAPE: gl.constexpr
):  # fmt: skip
    """Softmax of the tile in place ``i_copy`` while the product with values of ``i_v`` runs.

    ``b_in`` says which rows take part, ``b_age`` how far they are from the first key; where a mask
    is needed they see keys of ages from 0 to ``reach - 1``.
    """
    _, k_s, v_s = memory
    _, _, full, empty = bars
    stages: gl.constexpr = SHAPE[STAGES]
    pieces: gl.constexpr = SHAPE[DK] // SHAPE[COLUMNS]
    half: gl.constexpr = k_s.dtype
    b_s = gl.zeros([64, BN], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16]))
    o_n = gl.arange(0, BN, gl.SliceLayout(0, b_s.type.layout))
    i_s = i_copy % stages
    for h in gl.static_range(pieces):
        k = k_s.index(i_s * pieces + h).permute((1, 0))
        b_s = warpgroup_mma(b_q[h], k, b_s, use_acc=h > 0, is_async=True)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    # No branch may lie between the product with values and the wait for it.
    b_acc = rescale(b_acc, b_alpha)
    if masked:
        age = (b_age[:, None] - o_n[None, :]).to(gl.uint32, bitcast=True)
        b_s = gl.where(age < reach.to(gl.uint32, bitcast=True), b_s, float("-inf"))
    p_layout: gl.constexpr = gl.DotOperandLayout(0, b_acc.type.layout, 2)
    b_acc = warpgroup_mma(
        unpack(b_p, half, p_layout), v_s.index(i_v % stages), b_acc, is_async=True
    )
    # What is subtracted need not be the maximum, only near it: it mostly stays, and so do the sums.
    b_max = join_parts(fold(b_s, MAX=True), b_m, MAX=True)
    b_max = gl.where(b_in, b_max * scale_log2, LOWEST)
    b_m_new = gl.where(b_max > b_m + SLACK, b_max, b_m)
    b_sub = gl.where(b_in, b_m_new, float("inf"))
    b_e = exp2(b_s * scale_log2 - b_sub[:, None])
    b_alpha = exp2(b_m - b_m_new)
    b_l = scale_parts(b_l, b_alpha) + fold(b_e, MAX=False)
    # Given back here, next to the wait for the next copy, its barrier costs nothing. That wait
    # keeps ptxas from moving the one for the product up, before the exponentials.
    mbarrier.arrive(empty.index(gl.maximum(i_free, 0) % stages), count=1, pred=i_free >= 0)
    mbarrier.wait(full.index((i_copy + 1) % stages), ((i_copy + 1) // stages) & 1, pred=more)
    b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
    return pack(b_e, half), b_m_new, b_l, b_alpha, b_acc


@gluon.jit
def _consumer(
    ROW: gl.constexpr, tiles, lists, gates_ptr, o_cmp_ptr, outs, memory, bars, scale_log2,
    SHAPE: gl.constexpr
):  # fmt: skip
    """One warp group: rows ``ROW`` to ``ROW + 64`` of every tile."""
    group: gl.constexpr = SHAPE[G]
    dim: gl.constexpr = SHAPE[DV]
    columns: gl.constexpr = SHAPE[COLUMNS]
    pieces: gl.constexpr = SHAPE[DK] // columns
    stages: gl.constexpr = SHAPE[STAGES]
    rows_a_token: gl.constexpr = SHAPE[GP]
    MINE: gl.constexpr = ((1 << (64 // rows_a_token)) - 1) << (ROW // rows_a_token)
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
    nothing = pack(gl.zeros([64, BN], gl.float32, s_layout), half)
    o_m = ROW + gl.arange(0, 64, rows)
    lists = lists[0], lists[1], lists[2], unlike(lists[3])
    i_copy = 0
    q_phase = 0
    for i_flat in range(gl.program_id(0), tiles[1] * tiles[3], gl.num_programs(0)):
        place = _locate(i_flat, tiles, SHAPE)
        i_k, t_0, q_0, _k, n_q, start, last, i_list = place
        o_t = t_0 + token_of_row(o_m, group, rows_a_token)
        p_row = ((q_0 + o_t) * tiles[3] + i_k) * group + o_m % rows_a_token
        # On their way while the queries are.
        head = _entry(0, 0, 1, i_list, lists, SHAPE)
        chosen = _count(unlike(i_list.to(gl.int32)), lists, SHAPE)
        mbarrier.wait(q_full, q_phase)
        q_phase = q_phase ^ 1
        b_q = ()
        for h in gl.static_range(pieces):
            b_h = q_s.index(h).reshape([BM, columns]).slice(ROW, 64)
            b_q = b_q + (b_h.load(gl.DotOperandLayout(0, s_layout, 2)),)
        mbarrier.arrive(q_empty, count=1)
        chosen = same(chosen)
        for branch in range(FROM, TO):
            first, steps = _range(branch, place, chosen, tiles, SHAPE)
            reach = gl.where(branch == 0, 0x7FFFFFFF, tiles[7])
            oldest = last - reach + 1  # What the last query still sees.
            b_m = gl.full([64], LOWEST, gl.float32, rows)
            b_l = fold(gl.zeros([64, BN], gl.float32, s_layout), MAX=False)
            b_alpha = gl.zeros([64], gl.float32, rows)
            b_acc = gl.zeros([64, dim], gl.float32, o_layout)
            b_p = nothing
            # Places whose values wait for their product, and of the step before; none yet.
            i_v = -1
            i_free = -1
            seen = gl.to_tensor(0).to(gl.int64)
            entry = head
            mbarrier.wait(full.index(i_copy % stages), (i_copy // stages) & 1, pred=steps > 0)
            for j in range(steps):
                following = _entry(branch, j + 1, steps, i_list, lists, SHAPE)
                key, word = _keys(branch, j, first, entry, seen, SHAPE)
                more = j + 1 < steps
                # Values that wait keep their place of the ring until the next step. Were as many
                # tiles passed over as the ring has, the copy would wait for us, and we for it.
                full_ring = (i_v >= 0) & (i_copy - i_v >= stages - 2)
                if alike((word & MINE) != 0) | full_ring:
                    b_in = ((word >> (o_m // rows_a_token)) & 1) != 0
                    masked = alike((key + BN - 1 > start) | (key < oldest))
                    b_p, b_m, b_l, b_alpha, b_acc = _step(
                        i_copy, gl.where(i_v >= 0, i_v, i_copy), i_free, more, b_q, memory, bars,
                        b_p, b_m, b_l, b_alpha, b_acc, scale_log2, b_in, start - t_0 + o_t - key,
                        reach, masked, SHAPE
                    )  # fmt: skip
                    i_free = i_v
                    i_v = i_copy
                else:
                    mbarrier.arrive(empty.index(gl.maximum(i_free, 0) % stages), pred=i_free >= 0)
                    i_free = -1
                    mbarrier.arrive(empty.index(i_copy % stages), count=1)
                    mbarrier.wait(
                        full.index((i_copy + 1) % stages), ((i_copy + 1) // stages) & 1, more
                    )
                i_copy += 1
                seen = entry[1]
                entry = following
            mbarrier.arrive(empty.index(gl.maximum(i_free, 0) % stages), pred=i_free >= 0)
            if i_v >= 0:
                b_o = b_acc * gl.convert_layout(b_alpha, o_rows)[:, None]
                b_o = warpgroup_mma(
                    unpack(b_p, half, p_layout), v_s.index(i_v % stages), b_o, is_async=True
                )
                b_o = warpgroup_mma_wait(0, deps=(b_o,))
                mbarrier.arrive(empty.index(i_v % stages), count=1)
            else:
                b_o = b_acc
            b_l = join_parts(b_l, b_m, MAX=False)
            b_inv = 1.0 / gl.where(b_l == 0.0, 1.0, b_l)
            b_o = b_o * gl.convert_layout(b_inv, o_rows)[:, None]
            b_wide = widen(pack(b_o, half))
            p_o, m_o = wide_places(_here(p_row), o_t < n_q, dim // 2, dim // 2)
            if SHAPE[SAVE]:
                lse = (b_m + gl.log2(b_l)) * 0.6931471805599453
                if branch == 0:
                    gl.store(o_slc_ptr + p_o, b_wide, mask=m_o)
                    gl.store(lse_slc_ptr + p_row, lse, mask=o_t < n_q)
                else:
                    gl.store(o_win_ptr + p_o, b_wide, mask=m_o)
                    gl.store(lse_win_ptr + p_row, lse, mask=o_t < n_q)
            elif branch == 0:
                # Kept in memory while the window runs.
                gl.store(o_ptr + p_o, b_wide, mask=m_o)
            if SHAPE[COMBINE] and branch == 1:
                b_cmp = gl.load(o_cmp_ptr + p_o, mask=m_o, other=0)
                # Each thread reads back what it wrote itself.
                b_slc = gl.load((o_slc_ptr if SHAPE[SAVE] else o_ptr) + p_o, mask=m_o, other=0)
                wide_rows: gl.constexpr = gl.SliceLayout(1, b_wide.type.layout)
                p_gate = gl.convert_layout(_here(p_row), wide_rows) * 3
                m_row = gl.convert_layout((o_t < n_q).to(gl.int32), wide_rows) != 0
                low, high = 0.0, 0.0
                for i in gl.static_range(3):
                    b_low, b_high = floats((b_cmp, b_slc, b_wide)[i], half)
                    b_gate = gl.load(gates_ptr + p_gate + i, mask=m_row, other=0.0)
                    b_gate = b_gate.to(gl.float32)[:, None]
                    low += b_gate * b_low
                    high += b_gate * b_high
                gl.store(o_ptr + p_o, pack_pair(low, high, half), mask=m_o)


@gluon.jit(
    do_not_specialize=[
        "num_tiles", "num_seqs", "K", "T_q", "T_k", "q_offset", "window", "num_entries"
    ]
)  # fmt: skip
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
    num_tiles,
    num_seqs,
    K,
    T_q,
    T_k,
    q_offset,
    window,
    num_entries,
    scale_log2,
    SHAPE: gl.constexpr,
):
    """Grid: programs that share ``num_tiles * K`` tiles of 128 rows.

    Descriptors: ``q [T, H, DK]`` by ``[128 / GP, GP, COLUMNS]``, keys ``[T, K * DK]`` by
    ``[64, COLUMNS]``, values by ``[64, DV]``. Union lists, of ``num_entries`` blocks at most, are
    those of the tiles.
    """
    stages: gl.constexpr = SHAPE[STAGES]
    columns: gl.constexpr = SHAPE[COLUMNS]
    pieces: gl.constexpr = SHAPE[DK] // columns
    tokens: gl.constexpr = BM // SHAPE[GP]
    dim: gl.constexpr = SHAPE[DV]
    half: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(half, [pieces, tokens, SHAPE[GP], columns], q_desc.layout)
    k_s = gl.allocate_shared_memory(half, [stages * pieces, BN, columns], k_slc_desc.layout)
    v_s = gl.allocate_shared_memory(half, [stages, BN, dim], v_slc_desc.layout)
    q_full, q_empty = barriers(1, 1).index(0), barriers(1, 2).index(0)
    full, empty = barriers(stages, 1), barriers(stages, 2)
    fence_async_shared()
    barrier()
    memory = (q_s, k_s, v_s)
    bars = (q_full, q_empty, full, empty)
    tiles = (
        cu_seqlens_ptr, num_tiles, num_seqs, K, T_q, T_k, q_offset, window
    )  # fmt: skip
    lists = (blocks_ptr, bits_ptr, counts_ptr, num_entries)
    # Outputs are written, and read, as pairs.
    pair: gl.constexpr = gl.pointer_type(gl.int32)
    outs = (o_ptr.to(pair), o_slc_ptr.to(pair), o_win_ptr.to(pair), lse_slc_ptr, lse_win_ptr)
    o_cmp_ptr = o_cmp_ptr.to(pair)
    keys = (k_slc_desc, v_slc_desc, k_win_desc, v_win_desc)
    gl.warp_specialize(
        [
            (
                _consumer,
                (0, tiles, lists, gates_ptr, o_cmp_ptr, outs, memory, bars, scale_log2, SHAPE),
            ),
            (
                _consumer,
                (64, tiles, lists, gates_ptr, o_cmp_ptr, outs, memory, bars, scale_log2, SHAPE),
            ),
            (_producer, (tiles, lists, q_desc, keys, memory, bars, SHAPE)),
        ],
        [4, 1],
        [240, 24],
    )
