"""The choice of blocks: block scores, top-n, and the union of blocks of each query tile.

Scores are written for a chunk of queries at a time, so memory is linear in the length. Eq. 9 adds
to block ``j`` the compressed blocks of its own group of ``S = l'/d`` and the last ones of the group
before. Kernel one therefore writes two sums per group, ``own`` and ``next``, and kernel two reads
``own[j] + next[j - 1]``.
"""

import triton
import triton.language as tl

from nsa.kernels.tiles import locate_tile, num_visible


@triton.jit
def _sum_heads(b_p, BN: tl.constexpr, BQ: tl.constexpr, GP: tl.constexpr):
    """``[BN, BQ * GP] -> [BN, BQ]``.

    A thread of a wgmma accumulator holds two columns of every eight, so those that are its own are
    added before any shuffle.
    """
    if GP >= 8:
        b_p = tl.sum(tl.reshape(b_p, [BN, BQ, GP // 8, 8]), 2)
        b_p = tl.sum(tl.reshape(b_p, [BN, BQ, 4, 2]), 3)
        return tl.sum(b_p, 2)
    else:
        return tl.sum(tl.reshape(b_p, [BN, BQ, GP]), 2)


@triton.jit(do_not_specialize=["first_tile", "num_seqs", "T_q", "T_c", "q_offset"])
def block_scores_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    own_ptr,
    next_ptr,
    cu_seqlens_ptr,
    tile_offsets_ptr,
    first_tile,
    num_seqs,
    T_q,
    T_c,
    q_offset,
    scale_log2,
    stride_row,
    H: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SELECT: tl.constexpr,
    SP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (query tiles of the chunk, K).

    ``own``, ``next``: fp32 ``[chunk tiles, BQ, K, stride_row]``. A step takes ``BN / SP`` groups of
    ``S`` keys, each padded to ``SP``, a power of two.
    """
    BQ: tl.constexpr = BM // GP
    S: tl.constexpr = SELECT // STRIDE
    W: tl.constexpr = BLOCK // STRIDE
    NB: tl.constexpr = BN // SP
    STEP: tl.constexpr = NB * S
    i_k = tl.program_id(1)
    i_tile = first_tile + tl.num_programs(0) - 1 - tl.program_id(0)
    t_0, q_0, _, c_0, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, tile_offsets_ptr, num_seqs, T_q, T_q, T_c, BQ, STRIDE, PACKED
    )
    if t_0 >= n_q:
        return
    o_m = tl.arange(0, BM)
    o_t = t_0 + o_m // GP
    o_g = o_m % GP
    m_row = (o_t < n_q) & (o_g < G)
    p_row = (q_0 + o_t) * H + i_k * G + o_g
    o_dk = tl.arange(0, DKP)
    m_dk = o_dk < DK
    b_q = tl.load(
        q_ptr + p_row[:, None] * DK + o_dk[None, :], mask=m_row[:, None] & m_dk[None, :], other=0.0
    )
    b_lse = tl.load(lse_ptr + p_row, mask=m_row, other=float("inf")) * 1.4426950408889634
    b_visible = num_visible(q_offset + o_t, BLOCK, STRIDE)
    n_all = num_visible(q_offset + t_0, BLOCK, STRIDE)
    n_any = num_visible(q_offset + tl.minimum(t_0 + BQ, n_q) - 1, BLOCK, STRIDE)

    o_n = tl.arange(0, BN)
    m_group = o_n % SP < S
    o_n = o_n // SP * S + o_n % SP
    o_j = tl.arange(0, NB)
    o_q = tl.arange(0, BQ)
    o_s = tl.arange(0, SP)
    # Padding has the weights of no block: 0.
    w_own = tl.where(o_s < S, tl.minimum(W, S - o_s), 0).to(tl.float32)[None, :, None]
    w_next = tl.where(o_s < S, tl.maximum(W - (S - o_s), 0), 0).to(tl.float32)[None, :, None]
    i_row = (i_tile - first_tile).to(tl.int64) * BQ + o_q
    p_out = (i_row * K + i_k)[:, None] * stride_row + o_j[None, :]  # [BQ, NB]
    m_q = (t_0 + o_q < n_q)[:, None]
    p_k = k_ptr + (o_n * K + i_k)[:, None] * DK + o_dk[None, :]
    # Padding reads keys of the next group, so a padded step is never free of masks.
    n_full = n_all // STEP * STEP if SP == S else 0
    for c in range(0, n_full, STEP):
        b_k = tl.load(p_k + (c_0 + c) * K * DK, mask=m_dk[None, :], other=0.0)
        b_p = tl.exp2(
            tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2 - b_lse[None, :]
        )  # [BN, BM]
        b_p = tl.reshape(_sum_heads(b_p, BN, BQ, GP), [NB, SP, BQ])
        tl.store(own_ptr + p_out + c // S, tl.trans(tl.sum(b_p * w_own, 1)), mask=m_q)
        tl.store(next_ptr + p_out + c // S, tl.trans(tl.sum(b_p * w_next, 1)), mask=m_q)
    for c in range(n_full, n_any, STEP):
        m_n = m_group & (c + o_n < n_any)
        b_k = tl.load(p_k + (c_0 + c) * K * DK, mask=m_n[:, None] & m_dk[None, :], other=0.0)
        b_p = tl.exp2(
            tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2 - b_lse[None, :]
        )
        b_p = tl.where((c + o_n)[:, None] < b_visible[None, :], b_p, 0.0)
        b_p = tl.reshape(_sum_heads(b_p, BN, BQ, GP), [NB, SP, BQ])
        m_out = m_q & (c // S + o_j < tl.cdiv(n_any, S))[None, :]
        tl.store(own_ptr + p_out + c // S, tl.trans(tl.sum(b_p * w_own, 1)), mask=m_out)
        tl.store(next_ptr + p_out + c // S, tl.trans(tl.sum(b_p * w_next, 1)), mask=m_out)


@triton.jit(do_not_specialize=["first_tile", "num_seqs", "T_q", "q_offset"])
def top_blocks_kernel(
    own_ptr,
    next_ptr,
    indices_ptr,
    cu_seqlens_ptr,
    tile_offsets_ptr,
    first_tile,
    num_seqs,
    T_q,
    q_offset,
    stride_row,
    K: tl.constexpr,
    N: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SELECT: tl.constexpr,
    NP: tl.constexpr,
    BQ: tl.constexpr,
    NBP: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (queries of the chunk's tiles, K): ``indices [T, K, N]``, ascending.

    Unused slots are not written: they must hold -1 before.

    A score is at least 0, so its float bits order as an int. The n-th largest is found bit by bit,
    then everything above it is taken and, among equals, the lowest blocks.
    """
    S: tl.constexpr = SELECT // STRIDE
    i_k = tl.program_id(1)
    i_local = tl.program_id(0) // BQ
    t_0, q_0, _, _, n_q = locate_tile(
        first_tile + i_local, cu_seqlens_ptr, tile_offsets_ptr, num_seqs, T_q, T_q, 0, BQ, 1, PACKED
    )
    t = t_0 + tl.program_id(0) % BQ
    if t >= n_q:
        return
    n_scored = tl.cdiv(num_visible(q_offset + t, BLOCK, STRIDE), S)
    own_block = (q_offset + t) // SELECT
    o_j = tl.arange(0, NBP)
    # There is room around the rows, so whole vectors are read and masks come after.
    p_in = (tl.program_id(0).to(tl.int64) * K + i_k) * stride_row + o_j
    b_own = tl.load(own_ptr + p_in)
    b_next = tl.load(next_ptr + p_in - 1)
    b_key = tl.where(o_j < n_scored, b_own, 0.0) + tl.where(
        (o_j > 0) & (o_j <= n_scored), b_next, 0.0
    )
    b_key = b_key.to(tl.int32, bitcast=True)
    b_key = tl.where((o_j < NUM_INIT) | (o_j > own_block - NUM_LOCAL), 0x7F800000, b_key)
    b_key = tl.where(o_j > own_block, -1, b_key)
    b_cut = 0
    bit = 1 << 30
    while bit > 0:
        b_try = b_cut | bit
        # The sign of the difference is -1 for every smaller key.
        count = NBP + tl.sum((b_key - b_try) >> 31, 0)
        b_cut = tl.where(count >= N, b_try, b_cut)
        # A cut that leaves exactly N settles it.
        bit = tl.where(count == N, 0, bit >> 1)
    m_take = b_key >= b_cut
    if NBP + tl.sum((b_key - b_cut) >> 31, 0) > N:
        # Among equals, the lowest.
        m_above = b_key > b_cut
        room = N - tl.sum(m_above.to(tl.int32), 0)
        m_equal = b_key == b_cut
        m_take = m_above | (m_equal & (tl.cumsum(m_equal.to(tl.int32), 0) <= room))
    # Entry ``n`` is the n-th bit that is set, in words of 32: first its word, then its bit.
    o_n = tl.arange(0, NP)
    o_c = tl.arange(0, 32)
    b_take = tl.reshape(m_take & (b_key >= 0), [NBP // 32, 32]).to(tl.int32)
    b_word = tl.sum(b_take << o_c[None, :], 1)
    b_num = tl.sum(b_take, 1)
    b_until = tl.cumsum(b_num, 0)
    i_word = tl.minimum(tl.sum((b_until[:, None] <= o_n[None, :]).to(tl.int32), 0), NBP // 32 - 1)
    b_bits = (tl.gather(b_word, i_word, 0)[:, None] >> o_c[None, :]) & 1
    b_rank = o_n - tl.gather(b_until - b_num, i_word, 0)
    i_bit = tl.sum((tl.cumsum(b_bits, 1) <= b_rank[:, None]).to(tl.int32), 1)
    tl.store(
        indices_ptr + ((q_0 + t) * K + i_k) * N + o_n,
        i_word * 32 + i_bit,
        mask=(o_n < N) & (o_n < tl.sum(b_num, 0)),
    )


@triton.jit(do_not_specialize=["num_seqs", "T_q"])
def union_blocks_kernel(
    indices_ptr,
    blocks_ptr,
    bits_ptr,
    counts_ptr,
    cu_seqlens_ptr,
    tile_offsets_ptr,
    num_seqs,
    T_q,
    K: tl.constexpr,
    N: tl.constexpr,
    BQ: tl.constexpr,
    U: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (query tiles, K): the distinct blocks of a tile, ascending, and who chose them.

    ``blocks [tiles, K, U]``, ``counts [tiles, K]``; ``bits [tiles, K, U + 1]`` are prefix sums of
    one bit per token (modulo 2^64): token ``q`` of the tile chose entry ``u`` iff bit ``q`` of
    ``bits[u + 1] - bits[u]`` is set.
    """
    i_k = tl.program_id(1)
    i_tile = tl.program_id(0)
    t_0, q_0, _, _, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, tile_offsets_ptr, num_seqs, T_q, T_q, 0, BQ, 1, PACKED
    )
    p_tile = (i_tile * K + i_k).to(tl.int64)
    if t_0 >= n_q:
        tl.store(counts_ptr + p_tile, 0)
        return
    o_u = tl.arange(0, U)
    o_q = o_u // N
    m_in = (o_q < BQ) & (t_0 + o_q < n_q)
    b_block = tl.load(
        indices_ptr + ((q_0 + t_0 + o_q) * K + i_k) * N + o_u % N, mask=m_in, other=-1
    )
    # Unused slots go to the end: they sort after every block.
    b_key = tl.sort(tl.where(b_block < 0, 0x7FFFFFFF, b_block * BQ + o_q))
    m_used = b_key != 0x7FFFFFFF
    b_block = b_key // BQ
    b_before = tl.gather(b_block, tl.maximum(o_u - 1, 0), 0)
    m_first = m_used & ((o_u == 0) | (b_block != b_before))
    b_bit = tl.where(m_used, tl.full([U], 1, tl.int64) << (b_key % BQ).to(tl.int64), 0)
    b_sum = tl.cumsum(b_bit, 0)
    o_slot = tl.cumsum(m_first.to(tl.int32), 0) - 1
    count = tl.sum(m_first.to(tl.int32), 0)
    tl.store(blocks_ptr + p_tile * U + o_slot, b_block, mask=m_first)
    tl.store(bits_ptr + p_tile * (U + 1) + o_slot, b_sum - b_bit, mask=m_first)
    tl.store(bits_ptr + p_tile * (U + 1) + count, tl.sum(b_bit, 0))
    tl.store(counts_ptr + p_tile, count)
