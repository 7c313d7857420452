"""Backward, query side, on Hopper: ``dq`` of all branches, by two warpgroups that share keys.

``dq_kernel`` reads tiles of keys once for every 64 query rows, as fast as the L2 cache gives them.
Here a warp copies them into a ring for 128 rows. Each of two warpgroups has 64 of the rows and
works at its own pace, so that the softmax of one runs under the products of the other. Of selected
blocks the ring gets the union of what the 128 rows chose; a warpgroup passes over what none of its
own rows did.

A product has a power of two of columns: a head dim of 192 is cut into pieces of 64, others are one
piece.

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
    alike,
    barrier,
    barriers,
    exp2,
    pack,
    token_of_row,
    tokens_of,
    union_entry,
    unlike,
    wide_places,
    widen,
)
from nsa.kernels.tiles import locate_tile, num_visible, opaque

BM = gl.constexpr(128)  # Query rows of a tile: 64 for each warpgroup.
BN = gl.constexpr(64)  # Keys of a step, and of a selected block.
COMPRESSED = gl.constexpr(0)
SELECTED = gl.constexpr(1)
WINDOW = gl.constexpr(2)

# Entries of SHAPE, the sizes that are compiled in. BRANCHES: 1 compressed, 2 selected, 4 window.
# DK is the width of one of PIECES pieces.
H = gl.constexpr(0)
K = gl.constexpr(1)
G = gl.constexpr(2)
DK = gl.constexpr(3)
DV = gl.constexpr(4)
BLOCK = gl.constexpr(5)
STRIDE = gl.constexpr(6)
BRANCHES = gl.constexpr(7)
ALL = gl.constexpr(8)
STAGES = gl.constexpr(9)
PACKED = gl.constexpr(10)
PIECES = gl.constexpr(11)
U = gl.constexpr(12)  # Entries that a union list has room for.
GP = gl.constexpr(13)  # Rows of a token: a power of two, G or the next.


@gluon.jit
def _plan(i_flat, num_tiles, tiles, union, SHAPE: gl.constexpr):
    """Where to work in turn ``i_flat`` of the grid, the longest tiles first.

    Returns kv head, first token in its sequence, first rows of q, tokens and slots, number of
    queries, first key of the window, entry of the tile in ``union``, and steps of each branch.
    """
    tokens: gl.constexpr = BM // SHAPE[GP]
    cu_seqlens_ptr, num_seqs, T_q, T_k, T_c, q_offset, window, _ = tiles
    i_tile = num_tiles - 1 - i_flat // SHAPE[K]
    i_k = i_flat % SHAPE[K]
    packed: gl.constexpr = SHAPE[PACKED]
    stride: gl.constexpr = SHAPE[STRIDE]
    t_0, q_0, k_0, c_0, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, num_seqs, T_q, T_k, T_c, tokens, stride, packed
    )
    last = q_offset + gl.minimum(t_0 + tokens, n_q) - 1
    first = gl.maximum(q_offset + t_0 - window + 1, 0)
    p_tile = i_tile * SHAPE[K] + i_k
    exists = t_0 < n_q
    n_cmp = 0
    n_slc = 0
    n_win = 0
    if SHAPE[BRANCHES] & 1:
        n_any = num_visible(last, SHAPE[BLOCK], SHAPE[STRIDE])
        n_cmp = gl.where(exists, (n_any + BN - 1) // BN, 0)
    if SHAPE[BRANCHES] & 2:
        if SHAPE[ALL]:
            n_slc = gl.where(exists, last // BN + 1, 0)
        else:
            n_slc = gl.load(union[2] + p_tile).to(gl.int32)
    if SHAPE[BRANCHES] & 4:
        n_win = gl.where(exists, (last - first) // BN + 1, 0)
    rows = (q_0, k_0.to(gl.int32), c_0.to(gl.int32))
    return i_k, t_0, rows, n_q, first, p_tile, (n_cmp, n_slc, n_win)


@gluon.jit
def _fetch(i_copy, k_desc, v_desc, row, i_k, ring, SHAPE: gl.constexpr):
    """Starts the copies of 64 keys and values from ``row`` into the next place of the ring."""
    k_s, v_s, full, empty = ring
    key_dim: gl.constexpr = SHAPE[DK]
    value_dim: gl.constexpr = SHAPE[DV]
    pieces: gl.constexpr = SHAPE[PIECES]
    i_s = i_copy % SHAPE[STAGES]
    mbarrier.wait(empty.index(i_s), ((i_copy // SHAPE[STAGES]) & 1) ^ 1)
    mbarrier.expect(full.index(i_s), BN * (pieces * key_dim + value_dim) * 2)
    for h in gl.static_range(pieces):
        to = k_s.index(i_s * pieces + h)
        column = (i_k * pieces + h) * key_dim
        tma.async_copy_global_to_shared(k_desc, [row, column], full.index(i_s), to)
    tma.async_copy_global_to_shared(v_desc, [row, i_k * value_dim], full.index(i_s), v_s.index(i_s))


@gluon.jit
def _producer(descs, queries, ring, num_tiles, tiles, union, SHAPE: gl.constexpr):
    """Copies the queries of every tile and its keys, branch after branch."""
    q_desc, do_desc, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = descs
    q_s, do_s, q_full, q_empty = queries
    group: gl.constexpr = SHAPE[G]
    kv_heads: gl.constexpr = SHAPE[K]
    key_dim: gl.constexpr = SHAPE[DK]
    pieces: gl.constexpr = SHAPE[PIECES]
    i_copy = 0
    q_phase = 0
    for i_flat in range(gl.program_id(0), num_tiles * kv_heads, tiles[7]):
        i_k, t_0, rows, _, first, p_tile, steps = _plan(i_flat, num_tiles, tiles, union, SHAPE)
        mbarrier.wait(q_empty, q_phase ^ 1)
        mbarrier.expect(q_full, pieces * q_desc.block_type.nbytes + do_desc.block_type.nbytes)
        token = (rows[0] + t_0).to(gl.int32)
        for h in gl.static_range(pieces):
            to = q_s.index(h)
            tma.async_copy_global_to_shared(q_desc, [token, i_k * group, h * key_dim], q_full, to)
        tma.async_copy_global_to_shared(do_desc, [token, i_k * group, 0], q_full, do_s)
        q_phase = q_phase ^ 1
        if SHAPE[BRANCHES] & 1:
            for i in range(steps[0]):
                _fetch(i_copy, k_cmp, v_cmp, rows[2] + i * BN, i_k, ring, SHAPE)
                i_copy += 1
        if SHAPE[BRANCHES] & 2:
            if SHAPE[ALL]:
                for i in range(steps[1]):
                    _fetch(i_copy, k_slc, v_slc, rows[1] + i * BN, i_k, ring, SHAPE)
                    i_copy += 1
            else:
                p_block = union[0] + p_tile.to(gl.int64) * SHAPE[U]
                block = gl.load(p_block, mask=steps[1] > 0, other=0)
                for i in range(steps[1]):
                    following = gl.load(p_block + i + 1, mask=i + 1 < steps[1], other=0)
                    row = rows[1] + block.to(gl.int32) * BN
                    _fetch(i_copy, k_slc, v_slc, row, i_k, ring, SHAPE)
                    block = following
                    i_copy += 1
        if SHAPE[BRANCHES] & 4:
            for i in range(steps[2]):
                _fetch(i_copy, k_win, v_win, rows[1] + first + i * BN, i_k, ring, SHAPE)
                i_copy += 1


@gluon.jit
def _entry(i, count, p_tile, union, SHAPE: gl.constexpr):
    """Entry ``i`` of a tile's union list where there are any: see ``union_entry``."""
    if (SHAPE[BRANCHES] & 2) and not SHAPE[ALL]:
        return union_entry(i, count, p_tile.to(gl.int64), union[0], union[1], SHAPE[U])
    else:
        return gl.to_tensor(0), gl.to_tensor(0).to(gl.int64)


@gluon.jit
def _step(
    part, i_s, b_q, queries, ring, dq, zero, values, bits, sees, places, scale_log2, arrived,
    SHAPE: gl.constexpr
):  # fmt: skip
    """Adds 64 keys to ``dq``.

    ``b_q`` are the pieces of the queries, in registers or in shared memory. ``bits`` are the tokens
    that may see the keys at all. ``sees``: where the first key ends, how far apart keys end, how
    many tokens back a row sees, and whether any of it hides a key. ``places``: the token of each
    row, the number of each key.
    """
    _q_s, do_s, _full, _empty = queries
    k_s, v_s, _arrived, _free = ring
    b_lse, b_delta, b_gate = values
    end, spacing, reach, masked = sees
    o_q, o_n = places
    pieces: gl.constexpr = SHAPE[PIECES]
    b_s = zero
    for h in gl.static_range(pieces):
        b_k = k_s.index(i_s * pieces + h).permute((1, 0))
        b_s = warpgroup_mma(b_q[h], b_k, b_s, use_acc=h > 0, is_async=True)
    b_do = do_s.reshape([BM, SHAPE[DV]]).slice(part * 64, 64)
    b_v = v_s.index(i_s).permute((1, 0))
    b_dp = warpgroup_mma(b_do, b_v, zero, use_acc=False, is_async=True)
    b_lse = gl.where(((bits >> o_q) & 1) != 0, b_lse, float("inf"))
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    b_s = b_s * scale_log2 - b_lse[:, None]
    if masked:
        age = o_q[:, None] - (end + o_n * spacing)[None, :]
        b_s = gl.where((age >= 0) & (age < reach), b_s, float("-inf"))
    b_p = exp2(b_s)
    # The copy is here already; the branch keeps ptxas from moving the wait for ``dp`` up, before
    # the exponentials.
    mbarrier.wait(arrived[0], arrived[1])
    b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
    b_ds = b_p * (b_dp * b_gate[:, None] - b_delta[:, None])
    operand: gl.constexpr = gl.DotOperandLayout(0, dq[0].type.layout, 2)
    b_ds = gl.convert_layout(b_ds.to(k_s.dtype), operand)
    added = ()
    for h in gl.static_range(pieces):
        b_k = k_s.index(i_s * pieces + h)
        added = added + (warpgroup_mma(b_ds, b_k, dq[h], is_async=True),)
    done = warpgroup_mma_wait(0, deps=added)
    if pieces == 1:
        return (done,)
    else:
        return done


@gluon.jit
def _consumer(
    PART: gl.constexpr, rows_ptr, dq_ptr, queries, ring, num_tiles, tiles, union, num_rows,
    scale_log2, scale, SHAPE: gl.constexpr
):  # fmt: skip
    """One warpgroup: rows ``64 * PART`` to ``64 * PART + 64`` of every tile."""
    q_s, _do_s, q_full, q_empty = queries
    _k_s, _v_s, full, empty = ring
    group: gl.constexpr = SHAPE[G]
    kv_heads: gl.constexpr = SHAPE[K]
    key_dim: gl.constexpr = SHAPE[DK]
    pieces: gl.constexpr = SHAPE[PIECES]
    rows_a_token: gl.constexpr = SHAPE[GP]
    tokens: gl.constexpr = 64 // rows_a_token
    # Queries in registers spare shared memory a sixth of what a step reads. More than 128 columns
    # would spill; at 64 ptxas writes the gradient of the scores over them, though the next step
    # reads them again.
    IN_REGISTERS: gl.constexpr = key_dim == 128
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, key_dim, 16])
    zero = gl.zeros([64, BN], gl.float32, s_layout)
    o_n = gl.arange(0, BN, gl.SliceLayout(0, s_layout))
    o_m = gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    o_q = o_m // rows_a_token
    o_row = o_q * SHAPE[H] + o_m % rows_a_token  # From the tile's first row.
    every: gl.constexpr = (1 << tokens) - 1
    i_copy = 0
    q_phase = 0
    for i_flat in range(gl.program_id(0), num_tiles * kv_heads, tiles[7]):
        i_k, t_0, rows, n_q, first, p_tile, steps = _plan(i_flat, num_tiles, tiles, union, SHAPE)
        t_0 += PART * tokens
        o_t = t_0 + token_of_row(o_m, group, rows_a_token)
        dq = ()
        for _ in gl.static_range(pieces):
            dq = dq + (gl.zeros([64, key_dim], gl.float32, dq_layout),)
        mbarrier.wait(q_full, q_phase)
        q_phase = q_phase ^ 1
        b_q = ()
        for h in gl.static_range(pieces):
            b_h = q_s.index(h).reshape([BM, key_dim]).slice(PART * 64, 64)
            if IN_REGISTERS:
                b_h = b_h.load(gl.DotOperandLayout(0, s_layout, 2))
            b_q = b_q + (b_h,)
        # Lists on their way take registers, of which more than one piece leaves none.
        p_list = unlike(p_tile) if pieces == 1 else p_tile
        # Moves on by steps: multiples of ``num_rows`` would be kept.
        p_value = rows_ptr + ((rows[0] + t_0) * SHAPE[H] + i_k * group)
        # One loop for all branches: copies of it would crowd the instruction cache.
        for branch in range(3):
            count = gl.where(branch == COMPRESSED, steps[0], steps[2])
            count = gl.where(branch == SELECTED, steps[1], count)
            m_row = (o_t < n_q) & (count > 0)
            b_lse = gl.load(p_value + o_row, mask=m_row, other=float("inf"))
            p_value += num_rows
            b_delta = gl.load(p_value + o_row, mask=m_row, other=0.0)
            p_value += num_rows
            b_gate = gl.load(p_value + o_row, mask=m_row, other=0.0)
            p_value += num_rows
            # Keys end ``spacing`` tokens apart, and a row sees the last ``reach`` tokens.
            spacing = gl.where(branch == COMPRESSED, SHAPE[STRIDE], 1)
            reach = gl.where(branch == WINDOW, tiles[6], 1 << 30)
            origin = gl.where(branch == COMPRESSED, SHAPE[BLOCK] - 1, 0) - tiles[5] - t_0
            from_key = gl.where(branch == WINDOW, first, 0)
            listed = gl.where(branch == SELECTED, count, 0)
            seen = gl.to_tensor(0).to(gl.int64)
            entry = _entry(0, listed, p_list, union, SHAPE)
            for i in range(count):
                # A plain 1 is added to the address of the lists, ahead of all tiles, and spilled.
                following = _entry(i + opaque(1), listed, p_list, union, SHAPE)
                start = from_key + i * BN
                bits = gl.to_tensor(every)
                if (SHAPE[BRANCHES] & 2) and not SHAPE[ALL]:
                    start = gl.where(branch == SELECTED, entry[0].to(gl.int32) * BN, start)
                    bits = gl.where(
                        branch == SELECTED, tokens_of(entry, seen) >> (PART * tokens), every
                    )
                i_s = i_copy % SHAPE[STAGES]
                arrived = (full.index(i_s), (i_copy // SHAPE[STAGES]) & 1)
                mbarrier.wait(arrived[0], arrived[1])
                if alike((bits & every) != 0):
                    end = start * spacing + origin  # Of the first key, from the first token.
                    masked = alike((end + (BN - 1) * spacing > 0) | (end <= tokens - 1 - reach))
                    dq = _step(
                        PART, i_s, b_q, queries, ring, dq, zero, (b_lse, b_delta, b_gate), bits,
                        (end, spacing, reach, masked), (o_q, o_n), scale_log2, arrived,
                        SHAPE,
                    )  # fmt: skip
                mbarrier.arrive(empty.index(i_s), count=1)
                i_copy += 1
                seen = entry[1]
                entry = following
        mbarrier.arrive(q_empty, count=1)
        t_0 = opaque(t_0)
        o_t = t_0 + token_of_row(o_m, group, rows_a_token)
        p_row = (rows[0] + t_0) * SHAPE[H] + i_k * group + o_row
        p_out, keep = wide_places(p_row, o_t < n_q, pieces * key_dim // 2, key_dim // 2)
        p_dq = dq_ptr.to(gl.pointer_type(gl.int32)) + p_out  # Written as pairs.
        for h in gl.static_range(pieces):
            b_dq = widen(pack(dq[h] * scale, dq_ptr.dtype.element_ty))
            gl.store(p_dq + h * (key_dim // 2), b_dq, mask=keep)


@gluon.jit(
    do_not_specialize=[
        *("num_tiles", "num_programs", "num_seqs", "T_q", "T_k", "T_c", "q_offset", "window"),
    ]
)
def hopper_dq_kernel(
    q_desc,
    do_desc,
    k_cmp_desc,
    v_cmp_desc,
    k_slc_desc,
    v_slc_desc,
    k_win_desc,
    v_win_desc,
    rows_ptr,
    dq_ptr,
    blocks_ptr,
    bits_ptr,
    counts_ptr,
    cu_seqlens_ptr,
    num_tiles,
    num_programs,
    num_seqs,
    num_rows,
    T_q,
    T_k,
    T_c,
    q_offset,
    window,
    scale_log2,
    scale,
    SHAPE: gl.constexpr,
):
    """Grid: ``num_programs`` that share ``num_tiles * K`` tiles of 128 rows. As ``dq_kernel``.

    Their number is an argument, since what is asked of the grid would be kept in a register.

    Descriptors: ``q [T, H, D]`` by ``[128 / GP, GP, DK]``, do alike, keys ``[rows, K * D]`` by
    ``[64, DK]``, values alike; ``D`` is ``PIECES * DK``.
    """
    key_dim: gl.constexpr = SHAPE[DK]
    value_dim: gl.constexpr = SHAPE[DV]
    stages: gl.constexpr = SHAPE[STAGES]
    pieces: gl.constexpr = SHAPE[PIECES]
    rows: gl.constexpr = [pieces, BM // SHAPE[GP], SHAPE[GP], key_dim]
    q_s = gl.allocate_shared_memory(q_desc.dtype, rows, q_desc.layout)
    do_s = gl.allocate_shared_memory(do_desc.dtype, do_desc.block_shape, do_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [stages * pieces, BN, key_dim], k_cmp_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [stages, BN, value_dim], v_cmp_desc.layout)
    q_full, q_empty = barriers(1, 1).index(0), barriers(1, 2).index(0)
    full, empty = barriers(stages, 1), barriers(stages, 2)
    fence_async_shared()
    barrier()
    descs = (
        q_desc, do_desc, k_cmp_desc, v_cmp_desc, k_slc_desc, v_slc_desc, k_win_desc, v_win_desc
    )  # fmt: skip
    queries = (q_s, do_s, q_full, q_empty)
    ring = (k_s, v_s, full, empty)
    tiles = (cu_seqlens_ptr, num_seqs, T_q, T_k, T_c, q_offset, window, num_programs)
    union = (blocks_ptr, bits_ptr, counts_ptr)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    0, rows_ptr, dq_ptr, queries, ring, num_tiles, tiles, union, num_rows,
                    scale_log2, scale, SHAPE,
                ),
            ),
            (
                _consumer,
                (
                    1, rows_ptr, dq_ptr, queries, ring, num_tiles, tiles, union, num_rows,
                    scale_log2, scale, SHAPE,
                ),
            ),
            (_producer, (descs, queries, ring, num_tiles, tiles, union, SHAPE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
