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
def _token_and_head(o_m, BM: tl.constexpr, GP: tl.constexpr):
    """Of query row ``o_m``. A thread of a wgmma accumulator holds rows 8 apart: two heads."""
    half = o_m // 8 % 2
    rest = o_m // 16 * 8 + o_m % 8
    if GP == 1:
        return half * (BM // 2) + rest, half * 0
    else:
        return rest // (GP // 2), rest % (GP // 2) * 2 + half


@triton.jit
def _block_and_key(o_n, NB: tl.constexpr, SP: tl.constexpr):
    """Of column ``o_n``: which of the step's blocks, and which of its keys.

    A thread of an accumulator holds two columns of every eight: they are keys of the same blocks.
    """
    LANES: tl.constexpr = min(NB, 4)
    block = o_n // 2 % LANES * (NB // LANES) + o_n // (LANES * SP)
    return block, o_n // (2 * LANES) % (SP // 2) * 2 + o_n % 2


@triton.jit
def _sum(b_p, BQ: tl.constexpr, GP: tl.constexpr, NB: tl.constexpr, SP: tl.constexpr):
    """``[BQ * GP, NB * SP] -> [BQ, NB]``, without shuffles up to two heads."""
    BM: tl.constexpr = BQ * GP
    LANES: tl.constexpr = min(NB, 4)
    b_p = tl.reshape(b_p, [BM, NB // LANES, SP // 2, LANES, 2])
    b_p = tl.permute(tl.sum(tl.sum(b_p, 4), 2), (0, 2, 1))
    b_p = tl.reshape(b_p, [BM // 16, 2, 8, NB])
    if GP == 1:
        return tl.reshape(tl.permute(b_p, (1, 0, 2, 3)), [BM, NB])
    else:
        return tl.sum(tl.reshape(tl.sum(b_p, 1), [BQ, GP // 2, NB]), 1)


@triton.jit(do_not_specialize=["first_tile", "num_seqs", "T_q", "T_c", "q_offset"])
def block_scores_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    own_ptr,
    next_ptr,
    cu_seqlens_ptr,
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

    ``own``, ``next``: fp32 ``[chunk tiles, BQ, K, stride_row]``. A step takes and writes whole
    ``NB = BN / SP`` groups of ``S`` keys, and ``stride_row`` is a multiple of ``NB``. A group is
    padded to ``SP``, a power of two, 2 at least.
    """
    BQ: tl.constexpr = BM // GP
    S: tl.constexpr = SELECT // STRIDE
    W: tl.constexpr = BLOCK // STRIDE
    NB: tl.constexpr = BN // SP
    STEP: tl.constexpr = NB * S
    i_k = tl.program_id(1)
    i_tile = first_tile + tl.num_programs(0) - 1 - tl.program_id(0)
    t_0, q_0, _, c_0, n_q = locate_tile(
        i_tile, cu_seqlens_ptr, num_seqs, T_q, T_q, T_c, BQ, STRIDE, PACKED
    )
    if t_0 >= n_q:
        return
    o_m = tl.arange(0, BM)
    o_t, o_g = _token_and_head(o_m, BM, GP)
    o_t += t_0
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

    o_j, o_s = _block_and_key(tl.arange(0, BN), NB, SP)
    o_n = o_j * S + o_s
    # Padding has the weights of no block: 0.
    m_s = o_s < S
    w_own = tl.where(m_s, tl.minimum(W, S - o_s), 0).to(tl.float32)[None, :]
    w_next = tl.where(m_s, tl.maximum(W - (S - o_s), 0), 0).to(tl.float32)[None, :]
    o_q = tl.arange(0, BQ)
    i_row = (i_tile - first_tile).to(tl.int64) * BQ + o_q
    p_out = (i_row * K + i_k)[:, None] * stride_row + tl.arange(0, NB)[None, :]
    m_q = (t_0 + o_q < n_q)[:, None]
    p_k = k_ptr + (o_n * K + i_k)[:, None] * DK + o_dk[None, :]
    # Padding reads keys of the next group, so a padded step is never free of masks.
    n_full = n_all // STEP * STEP if SP == S else 0
    for c in range(0, n_full, STEP):
        b_k = tl.load(p_k + (c_0 + c) * K * DK, mask=m_dk[None, :], other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])  # [BM, BN]
        tl.store(own_ptr + p_out + c // S, _sum(b_p * w_own, BQ, GP, NB, SP), mask=m_q)
        tl.store(next_ptr + p_out + c // S, _sum(b_p * w_next, BQ, GP, NB, SP), mask=m_q)
    for c in range(n_full, n_any, STEP):
        m_n = m_s & (c + o_n < n_any)
        b_k = tl.load(p_k + (c_0 + c) * K * DK, mask=m_n[:, None] & m_dk[None, :], other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
        b_p = tl.where((c + o_n)[None, :] < b_visible[:, None], b_p, 0.0)
        tl.store(own_ptr + p_out + c // S, _sum(b_p * w_own, BQ, GP, NB, SP), mask=m_q)
        tl.store(next_ptr + p_out + c // S, _sum(b_p * w_next, BQ, GP, NB, SP), mask=m_q)


@triton.jit
def _bits_below(end):
    """The lowest ``end`` bits of a word, between none and all."""
    return tl.where(end >= 32, -1, (1 << tl.minimum(tl.maximum(end, 0), 31)) - 1)


@triton.jit
def _num_bits(word):
    """How many bits of a word are set: one instruction, which LLVM knows by this form."""
    x = word.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _bisect(b_key, n, first, last, NUM: tl.constexpr):
    """The largest cut from ``first`` to ``last`` that ``n`` of ``NUM`` keys reach.

    Or any that exactly ``n`` reach. The second result is how many do, or -1: not known. ``n`` keys
    or more reach ``max(first, 0)``, and fewer are above ``last``.
    """
    cut = tl.maximum(first, 0)
    end = tl.maximum(last, cut) + 1
    count = -1
    while (end - cut > 1) & (count != n):
        middle = cut + (end - cut) // 2
        # The sign of the difference is -1 for every smaller key.
        num = NUM + tl.sum((b_key - middle) >> 31, 0)
        enough = num >= n
        cut = tl.where(enough, middle, cut)
        count = tl.where(enough, num, count)
        end = tl.where(enough, end, middle)
    return cut, count


@triton.jit(do_not_specialize=["first_tile", "num_seqs", "T_q", "q_offset"])
def top_blocks_kernel(
    own_ptr,
    next_ptr,
    indices_ptr,
    cu_seqlens_ptr,
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

    A score is at least 0, so its float bits order as an int. The n-th largest is found by
    bisection, then everything above it is taken and, among equals, the lowest blocks.
    """
    GROUPS: tl.constexpr = min(NP, NBP)
    RUN: tl.constexpr = max(GROUPS, min(128, NBP))
    WORDS: tl.constexpr = NBP // 32
    i_k = tl.program_id(1)
    i_local = tl.program_id(0) // BQ
    t_0, q_0, _, _, n_q = locate_tile(
        first_tile + i_local, cu_seqlens_ptr, num_seqs, T_q, T_q, 0, BQ, 1, PACKED
    )
    t = t_0 + tl.program_id(0) % BQ
    if t >= n_q:
        return
    own_block = (q_offset + t) // SELECT
    first_local = own_block + 1 - NUM_LOCAL
    o_j = tl.arange(0, NBP)
    # Vectors that hold a candidate are read whole: there is room around the rows.
    m_read = o_j // 4 * 4 <= own_block
    p_in = (tl.program_id(0).to(tl.int64) * K + i_k) * stride_row
    b_own = tl.load(own_ptr + p_in + o_j, mask=m_read)
    b_next = tl.load(next_ptr + p_in - 1 + o_j, mask=m_read)
    if NUM_LOCAL == 0:
        # The last candidate can be without a sum of its own.
        n_scored = tl.cdiv(num_visible(q_offset + t, BLOCK, STRIDE), SELECT // STRIDE)
        b_own = tl.where(o_j < n_scored, b_own, 0.0)
    b_key = (b_own + tl.where(o_j > 0, b_next, 0.0)).to(tl.int32, bitcast=True)
    # Forced blocks are added later: the search is for the ``n`` largest of the others.
    b_key = tl.where((o_j >= NUM_INIT) & (o_j < first_local), b_key, -1)
    n = N - tl.minimum(NUM_INIT + NUM_LOCAL, own_block + 1)
    # Each of ``n`` groups or more has a key that is no smaller than the least of their maxima.
    b_max = tl.reshape(b_key, [NBP // RUN, GROUPS, RUN // GROUPS])
    b_max = tl.max(tl.max(b_max, 0), 1)
    first, last = tl.min(b_max, 0), tl.max(b_max, 0)
    if own_block < N:
        first, last = 0, 0  # All are taken.
    cut, count = _bisect(b_key, n, first, last, NBP)
    if (count != n) & (own_block >= N):
        # Among equals, the lowest.
        b_late = tl.where(b_key == cut, NBP - o_j, -1)
        b_key = tl.where(b_key > cut, 0x7F800000, b_late)
        cut, count = _bisect(b_key, n, 1, NBP + 1, NBP)
    b_word = tl.reshape((b_key >= cut).to(tl.int32), [WORDS, 8, 4])
    b_word = tl.sum(b_word << tl.arange(0, 4)[None, None, :], 2)
    b_word = tl.sum(b_word << 4 * tl.arange(0, 8)[None, :], 1)
    # Threads that each hold copies of several words get one each.
    o_w = tl.arange(0, WORDS)
    b_word = tl.gather(b_word, o_w, 0)
    b_first, b_local, b_end = NUM_INIT - o_w * 32, first_local - o_w * 32, own_block + 1 - o_w * 32
    b_word |= (_bits_below(b_first) | ~_bits_below(b_local)) & _bits_below(b_end)
    # Entry ``n`` is the n-th bit that is set: its word and then its bit, each by bisection.
    o_n = tl.arange(0, NP)
    b_num = _num_bits(b_word)
    b_until = tl.cumsum(b_num, 0)
    i_word = tl.zeros([NP], tl.int32)
    for e in tl.static_range(WORDS.bit_length() - 1):
        half = WORDS >> (e + 1)
        i_word += tl.where(tl.gather(b_until, i_word + half - 1, 0) <= o_n, half, 0)
    b_rank = o_n - tl.gather(b_until - b_num, i_word, 0)
    b_word = tl.gather(b_word, i_word, 0)
    i_bit = tl.zeros([NP], tl.int32)
    for e in tl.static_range(5):
        half = 16 >> e
        b_below = _num_bits(b_word & ((1 << (i_bit + half)) - 1))
        i_bit += tl.where(b_below <= b_rank, half, 0)
    tl.store(
        indices_ptr + ((q_0 + t) * K + i_k) * N + o_n,
        i_word * 32 + i_bit,
        mask=(o_n < N) & (o_n <= own_block),
    )


@triton.jit(do_not_specialize=["num_seqs", "T_q", "q_offset"])
def all_blocks_kernel(
    indices_ptr,
    cu_seqlens_ptr,
    num_seqs,
    T_q,
    q_offset,
    K: tl.constexpr,
    N: tl.constexpr,
    SELECT: tl.constexpr,
    NP: tl.constexpr,
    BQ: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (query tiles, K): the choice where every candidate is taken."""
    i_tile = tl.program_id(0)
    t_0, q_0, _, _, n_q = locate_tile(i_tile, cu_seqlens_ptr, num_seqs, T_q, T_q, 0, BQ, 1, PACKED)
    o_t = t_0 + tl.arange(0, BQ)[:, None]
    o_n = tl.arange(0, NP)[None, :]
    chosen = tl.where(o_n <= (q_offset + o_t) // SELECT, o_n, -1)
    p_out = indices_ptr + ((q_0 + o_t).to(tl.int64) * K + tl.program_id(1)) * N + o_n
    tl.store(p_out, chosen, mask=(o_t < n_q) & (o_n < N))


@triton.jit
def _take_turns(b_block, b_bit, m_first, count, BQ: tl.constexpr, U: tl.constexpr):
    """Blocks, and sums of bits: first those that both halves of the tokens chose, then in turns.

    ``m_first`` says where a block is the first of several equal ones that follow each other.
    """
    HALF: tl.constexpr = BQ // 2
    o_u = tl.arange(0, U)
    b_word = b_bit
    for e in tl.static_range(1, BQ):
        i_u = tl.minimum(o_u + e, U - 1)
        same = (o_u + e < U) & (tl.gather(b_block, i_u, 0) == b_block)
        b_word |= tl.where(same, tl.gather(b_bit, i_u, 0), 0)
    in_0 = m_first & ((b_word & ((1 << HALF) - 1)) != 0)
    in_1 = m_first & ((b_word >> HALF) != 0)
    both = in_0 & in_1
    r_both = tl.cumsum(both.to(tl.int32), 0)
    r_0 = U + 2 * tl.cumsum((in_0 & ~both).to(tl.int32), 0)
    r_1 = U + 2 * tl.cumsum((in_1 & ~both).to(tl.int32), 0) + 1
    b_rank = tl.where(both, r_both, tl.where(in_0, r_0, r_1)).to(tl.int64)
    # A block's number has 24 bits, a word 16.
    b_key = (b_rank << 40) | (b_block.to(tl.int64) << 16) | b_word
    b_key = tl.sort(tl.where(m_first, b_key, 0x7FFFFFFFFFFFFFFF))
    b_word = tl.where(o_u < count, b_key & 0xFFFF, 0)
    return ((b_key >> 16) & 0xFFFFFF).to(tl.int32), tl.cumsum(b_word, 0)


@triton.jit(do_not_specialize=["num_seqs", "T_q"])
def union_blocks_kernel(
    indices_ptr,
    blocks_ptr,
    bits_ptr,
    counts_ptr,
    cu_seqlens_ptr,
    num_seqs,
    T_q,
    K: tl.constexpr,
    N: tl.constexpr,
    BQ: tl.constexpr,
    U: tl.constexpr,
    TURNS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (query tiles, K): the distinct blocks of a tile, ascending, and who chose them.

    ``blocks [tiles, K, U]``, ``counts [tiles, K]``; ``bits [tiles, K, U + 1]`` are prefix sums of
    one bit per token (modulo 2^64): token ``q`` of the tile chose entry ``u`` iff bit ``q`` of
    ``bits[u + 1] - bits[u]`` is set.

    With ``TURNS``, for kernels whose two warp groups have half of the tokens each, blocks that one
    half chose come in turns: in any other order one waits while the ring has tiles of the other.
    """
    i_k = tl.program_id(1)
    i_tile = tl.program_id(0)
    t_0, q_0, _, _, n_q = locate_tile(i_tile, cu_seqlens_ptr, num_seqs, T_q, T_q, 0, BQ, 1, PACKED)
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
    if TURNS:
        b_block, b_sum = _take_turns(b_block, b_bit, m_first, count, BQ, U)
        m_entry = o_u < count
        tl.store(blocks_ptr + p_tile * U + o_u, b_block, mask=m_entry)
        tl.store(bits_ptr + p_tile * (U + 1) + o_u + 1, b_sum, mask=m_entry)
        tl.store(bits_ptr + p_tile * (U + 1), tl.zeros([], tl.int64))
        tl.store(counts_ptr + p_tile, count)
        return
    tl.store(blocks_ptr + p_tile * U + o_slot, b_block, mask=m_first)
    tl.store(bits_ptr + p_tile * (U + 1) + o_slot, b_sum - b_bit, mask=m_first)
    tl.store(bits_ptr + p_tile * (U + 1) + count, tl.sum(b_bit, 0))
    tl.store(counts_ptr + p_tile, count)
