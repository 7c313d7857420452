"""Block scores for Hopper: what ``block_scores_kernel`` writes, with keys copied ahead.

The two warp groups of a program share tiles of keys, and each has its own half of the queries. See
``nsa.kernels.hopper_tiles``.
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

from nsa.kernels.hopper_tiles import barrier, barriers, exp2, tile_steps
from nsa.kernels.tiles import num_visible


@gluon.jit
def _producer(
    tiles,
    turns,
    k_desc,
    ring,
    K: gl.constexpr,
    DK: gl.constexpr,
    BQ: gl.constexpr,
    BN: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """Keys, from the last that a tile sees to the first, an even number of steps."""
    last_tile, num_tiles = turns
    k_s, full, empty = ring
    COLUMNS: gl.constexpr = k_s.shape[2]
    PIECES: gl.constexpr = DK // COLUMNS
    i_copy = 0
    for i_flat in range(gl.program_id(0), num_tiles * K, gl.num_programs(0)):
        i_k, _, _, c_0, _, _, steps, _ = tile_steps(
            i_flat, last_tile, tiles, K, BQ, BN, BLOCK, STRIDE, PACKED
        )
        total = (steps + 1) // 2 * 2
        for j in range(total):
            i_s = i_copy % STAGES
            mbarrier.wait(empty.index(i_s), ((i_copy // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(i_s), PIECES * k_desc.block_type.nbytes)
            row = c_0 + (total - 1 - j) * BN
            for h in gl.static_range(PIECES):
                tma.async_copy_global_to_shared(
                    k_desc,
                    [row, i_k * DK + h * COLUMNS],
                    full.index(i_s),
                    k_s.index(i_s * PIECES + h),
                )
            i_copy += 1


@gluon.jit
def _logits(k_s, i_s, queries, zero):
    """Starts the product of the keys of place ``i_s`` with queries, a tuple of pieces."""
    PIECES: gl.constexpr = len(queries)
    b_s = zero
    for h in gl.static_range(PIECES):
        b_k, b_q = k_s.index(i_s * PIECES + h), queries[h].permute((1, 0))
        b_s = warpgroup_mma(b_k, b_q, b_s, use_acc=h > 0, is_async=True)
    return b_s


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
        token = o_m // (8 * LOW) * LANES + o_m // 2 % LANES
        head = (o_m // 8 % LOW * (4 // LANES) + o_m // 2 % 4 // LANES) * 2 + o_m % 2
        return token, head


@gluon.jit
def _sum_heads(b_p, BN: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr):
    """``[BN, BQ * GP] -> [BN, BQ]``, columns as ``_row_of_column`` has them: no shuffles."""
    if GP == 1:
        return b_p
    else:
        LANES: gl.constexpr = 4 if BQ >= 4 else BQ
        LOW: gl.constexpr = GP // 2 // (4 // LANES)
        b_p = gl.reshape(b_p, [BN, BQ // LANES, LOW, 4 // LANES, LANES, 2])
        return gl.reshape(gl.sum(gl.sum(gl.sum(b_p, 5), 2), 2), [BN, BQ])


@gluon.jit
def _write_sums(
    b_s,
    first_key,
    rows,
    GP: gl.constexpr,
    BQ: gl.constexpr,
    S: gl.constexpr,
    W: gl.constexpr,
    MASKED: gl.constexpr,
):
    """``own`` and ``next`` of one step's logits ``[BN, BQ * GP]``."""
    b_lse, b_visible, n_any, sums, scale_log2 = rows
    own_ptr, next_ptr, i_row, n_rows, K, i_k, stride_row = sums
    BN: gl.constexpr = b_s.shape[0]
    b_p = exp2(b_s * scale_log2 - b_lse[None, :])
    if MASKED:
        o_n = first_key + gl.arange(0, BN, gl.SliceLayout(1, b_s.type.layout))
        b_p = gl.where(o_n[:, None] < b_visible[None, :], b_p, 0.0)
    b_p = gl.reshape(_sum_heads(b_p, BN, GP, BQ), [BN // S, S, BQ])
    o_s = gl.arange(0, S, gl.SliceLayout(0, gl.SliceLayout(2, b_p.type.layout)))
    w_own = gl.minimum(S - o_s, W).to(gl.float32)
    w_next = gl.maximum(W - (S - o_s), 0).to(gl.float32)
    b_own = gl.sum(b_p * gl.expand_dims(gl.expand_dims(w_own, 0), 2), 1)  # [BN / S, BQ]
    b_next = gl.sum(b_p * gl.expand_dims(gl.expand_dims(w_next, 0), 2), 1)
    o_j = first_key // S + gl.arange(0, BN // S, gl.SliceLayout(1, b_own.type.layout))
    o_q = gl.arange(0, BQ, gl.SliceLayout(0, b_own.type.layout))
    p_out = ((i_row + o_q) * K + i_k)[None, :] * stride_row + o_j[:, None]
    m_out = (o_q < n_rows)[None, :]
    if MASKED:
        m_out = m_out & (o_j < (n_any + S - 1) // S)[:, None]
    gl.store(own_ptr + p_out, b_own, mask=m_out)
    gl.store(next_ptr + p_out, b_next, mask=m_out)


@gluon.jit
def _pair(
    i_copy,
    more,
    queries,
    ring,
    b_s,
    zero,
    first_key,
    rows,
    GP: gl.constexpr,
    BQ: gl.constexpr,
    S: gl.constexpr,
    W: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Two steps, whose logits keep different registers: ``b_s`` and those of the next keys.

    Each step's product runs while the sums of the one before are taken. A wait for a copy in
    between keeps ptxas from moving the wait for the product up, before the exponentials.
    """
    k_s, full, empty = ring
    BN: gl.constexpr = zero.shape[0]
    i_s = i_copy % STAGES
    b_next = _logits(k_s, i_s, queries, zero)
    _write_sums(b_s, first_key, rows, GP, BQ, S, W, MASKED)
    i_n = (i_copy + 1) % STAGES
    mbarrier.wait(full.index(i_n), ((i_copy + 1) // STAGES) & 1, pred=more)
    b_next = warpgroup_mma_wait(0, deps=(b_next,))
    mbarrier.arrive(empty.index(i_s), count=1)
    # After the last pair, the product of whatever is in the ring is not looked at.
    b_s = _logits(k_s, i_n, queries, zero)
    _write_sums(b_next, first_key - BN, rows, GP, BQ, S, W, MASKED)
    i_m = (i_copy + 2) % STAGES
    mbarrier.wait(full.index(i_m), ((i_copy + 2) // STAGES) & 1, pred=more)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    mbarrier.arrive(empty.index(i_n), count=1, pred=more)
    return b_s


@gluon.jit
def _consumer(
    tiles,
    turns,
    inputs,
    out,
    q_s,
    ring,
    HALF: gl.constexpr,
    H: gl.constexpr,
    K: gl.constexpr,
    G: gl.constexpr,
    GP: gl.constexpr,
    DK: gl.constexpr,
    BQ: gl.constexpr,
    BN: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    S: gl.constexpr,
    W: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):
    """One warp group: ``BQ`` tokens, half ``HALF`` of every tile."""
    last_tile, num_tiles = turns
    q_ptr, lse_ptr, scale_log2 = inputs
    own_ptr, next_ptr, stride_row = out
    k_s, full, empty = ring
    ROWS: gl.constexpr = BQ * GP
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    COLUMNS: gl.constexpr = q_s.shape[2]
    PIECES: gl.constexpr = DK // COLUMNS
    lanes: gl.constexpr = [256 // COLUMNS, COLUMNS // 8]
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], lanes, [4, 1], [1, 0])
    zero = gl.zeros([BN, ROWS], gl.float32, s_layout)
    o_d = gl.arange(0, COLUMNS, gl.SliceLayout(0, q_layout))
    queries = ()
    for h in gl.static_range(PIECES):
        queries = queries + (q_s.index(HALF * PIECES + h),)
    q_token, q_head = _row_of_column(gl.arange(0, ROWS, gl.SliceLayout(1, q_layout)), GP, BQ)
    s_token, s_head = _row_of_column(gl.arange(0, ROWS, gl.SliceLayout(0, s_layout)), GP, BQ)
    i_copy = 0
    for i_flat in range(gl.program_id(0), num_tiles * K, gl.num_programs(0)):
        i_k, t_0, q_0, _, n_q, n_any, steps, masked = tile_steps(
            i_flat, last_tile, tiles, K, 2 * BQ, BN, BLOCK, STRIDE, PACKED
        )
        total = (steps + 1) // 2 * 2
        t_0 += HALF * BQ
        p_row = (q_0 + t_0 + q_token) * H + i_k * G + q_head
        m_row = (t_0 + q_token < n_q) & (q_head < G)
        p_q = q_ptr + p_row[:, None] * DK + o_d[None, :]
        loaded = ()
        for h in gl.static_range(PIECES):
            loaded = loaded + (gl.load(p_q + h * COLUMNS, mask=m_row[:, None], other=0.0),)
        # On their way with the queries: whatever used them here would wait.
        p_row = (q_0 + t_0 + s_token) * H + i_k * G + s_head
        m_row = (t_0 + s_token < n_q) & (s_head < G)
        b_lse = gl.load(lse_ptr + p_row, mask=m_row, other=float("inf"))
        # Every warp is done with the queries of the last tile.
        barrier()
        for h in gl.static_range(PIECES):
            queries[h].store(loaded[h])
        fence_async_shared()
        barrier()
        b_visible = num_visible(tiles[4] + t_0 + s_token, BLOCK, STRIDE)
        b_lse = b_lse * 1.4426950408889634
        i_row = (num_tiles - 1 - i_flat // K).to(gl.int64) * (2 * BQ) + HALF * BQ
        sums = (own_ptr, next_ptr, i_row, n_q - t_0, K, i_k, stride_row)
        rows = (b_lse, b_visible, n_any, sums, scale_log2)
        if total > 0:
            i_s = i_copy % STAGES
            mbarrier.wait(full.index(i_s), (i_copy // STAGES) & 1)
            b_s = _logits(k_s, i_s, queries, zero)
            i_n = (i_copy + 1) % STAGES
            mbarrier.wait(full.index(i_n), ((i_copy + 1) // STAGES) & 1)
            b_s = warpgroup_mma_wait(0, deps=(b_s,))
            mbarrier.arrive(empty.index(i_s), count=1)
            pairs = (total - (steps - masked) + 1) // 2
            for j in range(pairs):
                b_s = _pair(
                    i_copy + 1, 2 * j + 2 < total, queries, ring, b_s, zero,
                    (total - 1 - 2 * j) * BN, rows, GP, BQ, S, W, STAGES, True
                )  # fmt: skip
                i_copy += 2
            for j in range(pairs, total // 2):
                b_s = _pair(
                    i_copy + 1, 2 * j + 2 < total, queries, ring, b_s, zero,
                    (total - 1 - 2 * j) * BN, rows, GP, BQ, S, W, STAGES, False
                )  # fmt: skip
                i_copy += 2


@gluon.jit(
    do_not_specialize=[
        "first_tile", "num_tiles", "num_seqs", "T_q", "T_c", "q_offset", "stride_row"
    ]
)  # fmt: skip
def hopper_scores_kernel(
    k_desc,
    q_ptr,
    lse_ptr,
    own_ptr,
    next_ptr,
    cu_seqlens_ptr,
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
    """Grid: programs that share ``num_tiles * K`` tiles of ``BM / GP`` tokens.

    ``own``, ``next``: fp32 ``[num_tiles * BM / GP, K, stride_row]``. Descriptor: ``k [slots,
    K * DK]`` by ``[BN, COLUMNS]``, pieces of a head dim that is no power of two. ``SELECT /
    STRIDE`` keys a block are a power of two, ``BN`` at most.
    """
    S: gl.constexpr = SELECT // STRIDE
    W: gl.constexpr = BLOCK // STRIDE
    BQ: gl.constexpr = BM // 2 // GP
    COLUMNS: gl.constexpr = k_desc.block_shape[1]
    PIECES: gl.constexpr = DK // COLUMNS
    q_s = gl.allocate_shared_memory(k_desc.dtype, [2 * PIECES, BM // 2, COLUMNS], k_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES * PIECES, BN, COLUMNS], k_desc.layout)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)
    fence_async_shared()
    barrier()
    tiles = (cu_seqlens_ptr, num_seqs, T_q, T_c, q_offset)
    last_tile = first_tile + num_tiles - 1
    inputs = (q_ptr, lse_ptr, scale_log2)
    out = (own_ptr, next_ptr, stride_row)
    turns = (last_tile, num_tiles)
    ring = (k_s, full, empty)
    gl.warp_specialize(
        [
            (_consumer, (
                tiles, turns, inputs, out, q_s, ring, 0, H, K, G, GP, DK, BQ, BN, BLOCK,
                STRIDE, S, W, STAGES, PACKED
            )),
            (_consumer, (
                tiles, turns, inputs, out, q_s, ring, 1, H, K, G, GP, DK, BQ, BN, BLOCK,
                STRIDE, S, W, STAGES, PACKED
            )),
            (_producer, (
                tiles, turns, k_desc, ring, K, DK, 2 * BQ, BN, BLOCK, STRIDE, STAGES, PACKED
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
