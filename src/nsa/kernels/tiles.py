"""What every kernel shares: which tokens a program works on, and how query rows are laid out.

Legend of all kernels: ``B`` batch, ``T`` tokens, ``H`` query heads, ``K`` kv heads, ``G = H / K``
group size, ``GP`` the next power of two, ``DK``/``DV`` head dims, ``DKP``/``DVP`` their next powers
of two. ``i_`` index of the program, ``o_`` offsets, ``m_`` masks, ``p_`` pointers or row numbers,
``b_`` tiles held on chip.

A query tile has ``BM`` rows: ``BQ = BM // GP`` consecutive tokens times the ``GP`` heads of one kv
head. Tensors are contiguous; a batch is read as one long list of tokens, in which sequence ``b``
starts at ``b * T`` (packed: ``cu_seqlens[b]``). Addresses are int64.
"""

import triton
import triton.language as tl


@triton.jit
def first_number(starts_ptr, i, UNIT):
    """The first number of range ``i`` where ranges are cut into units of up to ``UNIT`` elements.

    A closed form of where the range starts, which leaves room for a last unit that is not full:
    there may be a number without elements behind it.
    """
    return tl.load(starts_ptr + i) // UNIT + i


@triton.jit
def find_numbered(starts_ptr, num, number, UNIT):
    """The last of ``num`` ranges whose ``first_number`` is ``number`` at most."""
    lo = 0
    hi = num
    while lo + 1 < hi:
        mid = (lo + hi) // 2
        before = first_number(starts_ptr, mid, UNIT) <= number
        lo = tl.where(before, mid, lo)
        hi = tl.where(before, hi, mid)
    return lo


@triton.jit
def locate_tile(
    i_tile,
    cu_seqlens_ptr,
    num_seqs,
    T_q,
    T_k,
    T_c,
    BQ: tl.constexpr,
    STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """First token of a tile in its sequence; first rows of q, k, slots; number of queries."""
    if PACKED:
        i_seq = find_numbered(cu_seqlens_ptr, num_seqs, i_tile, BQ)
        start = tl.load(cu_seqlens_ptr + i_seq).to(tl.int64)
        n_q = (tl.load(cu_seqlens_ptr + i_seq + 1) - start).to(tl.int32)
        t_0 = (i_tile - first_number(cu_seqlens_ptr, i_seq, BQ)) * BQ
        return t_0, start, start, start // STRIDE, n_q
    else:
        tiles = tl.cdiv(T_q, BQ)
        i_b = (i_tile // tiles).to(tl.int64)
        return (i_tile % tiles) * BQ, i_b * T_q, i_b * T_k, i_b * T_c, T_q


@triton.jit
def query_rows(
    t_0, q_0, n_q, i_k, H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BM: tl.constexpr
):
    """Of each row of a tile: its token, its row of q, and whether it exists."""
    o_m = tl.arange(0, BM)
    o_t = t_0 + o_m // GP
    o_g = o_m % GP
    return o_t, (q_0 + o_t) * H + i_k * G + o_g, (o_t < n_q) & (o_g < G)


@triton.jit
def opaque(x, AXIS: tl.constexpr = 0):
    """``x``, which the compiler does not know to be ``x``.

    What is computed from it after a loop takes no registers during the loop, even if it was
    computed before the loop already. ``AXIS`` is one whose number of programs the kernel does not
    ask for elsewhere: it would be kept.
    """
    return x + (tl.program_id(AXIS) >= tl.num_programs(AXIS)).to(tl.int32)


@triton.jit
def num_visible(position, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """Compressed blocks that lie wholly at or before ``position``."""
    return tl.maximum(position + 1 - BLOCK + STRIDE, 0) // STRIDE


@triton.jit
def softmax_step(b_s, b_m, b_l, b_acc):
    """One online-softmax step on base-2 logits ``[BM, BN]``: probabilities, rescaled states."""
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
    # Rows that have seen no key yet keep m = -inf; subtracting 0 then gives exp2(-inf) = 0, not
    # NaN.
    b_m_safe = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = tl.exp2(b_s - b_m_safe[:, None])
    b_alpha = tl.exp2(b_m - b_m_safe)
    return b_p, b_m_new, b_l * b_alpha + tl.sum(b_p, 1), b_acc * b_alpha[:, None]


@triton.jit
def chosen_block(blocks_ptr, bits_ptr, p_tile, u, position, o_q, U: tl.constexpr):
    """Entry ``u`` of a tile's union list, and the last position each row sees in it.

    Rows of tokens that did not choose the block see nothing: -1.
    """
    block = tl.load(blocks_ptr + p_tile * U + u)
    p_bits = bits_ptr + p_tile * (U + 1) + u
    bits = tl.load(p_bits + 1) - tl.load(p_bits)
    return block, tl.where(((bits >> o_q.to(tl.int64)) & 1) != 0, position, -1)
