"""Sums of float32 parts that several programs wrote, always in the same order.

Keys and values are two *sides*, first and last on the last axis of the grid.
"""

import triton
import triton.language as tl

from nsa.kernels.tiles import first_number, locate_tile


@triton.jit
def _sum(p_part, stride, count, mask):
    """Of ``count`` tiles, ``stride`` elements apart; loads of eight are under way together."""
    b_sum = tl.zeros(mask.shape, tl.float32)
    for _ in tl.range(0, count, loop_unroll_factor=8):
        b_sum += tl.load(p_part, mask=mask, other=0.0)
        p_part += stride
    return b_sum


@triton.jit(do_not_specialize=["count"])
def sum_parts_kernel(
    parts_k_ptr, parts_v_ptr, out_k_ptr, out_v_ptr, size_k, size_v, count, BN: tl.constexpr
):
    """Grid (elements / BN, sides): ``out [size]`` of ``parts [count, size]``."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    if tl.program_id(1) == 0:
        b_sum = _sum(parts_k_ptr + o_n, size_k, count, o_n < size_k)
        tl.store(out_k_ptr + o_n, b_sum.to(out_k_ptr.dtype.element_ty), mask=o_n < size_k)
    else:
        b_sum = _sum(parts_v_ptr + o_n, size_v, count, o_n < size_v)
        tl.store(out_v_ptr + o_n, b_sum.to(out_v_ptr.dtype.element_ty), mask=o_n < size_v)


@triton.jit(do_not_specialize=["num_seqs", "num_blocks", "segment", "T_k"])
def sum_lists_kernel(
    parts_k_ptr,
    parts_v_ptr,
    dk_ptr,
    dv_ptr,
    entry_offsets_ptr,
    cu_seqlens_ptr,
    num_seqs,
    num_blocks,
    segment,
    T_k,
    SUMS: tl.constexpr,
    K: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DKP: tl.constexpr,
    DVP: tl.constexpr,
    SELECT: tl.constexpr,
    PACKED: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid (blocks, SELECT / BN, K * sides): gradients of the keys of a block.

    Adds the parts of the block's list, ``SUMS`` sums each, which ``selected_dkv_kernel`` numbers.
    """
    i_block = tl.program_id(0)
    i_k = tl.program_id(2) % K
    i_list = i_k * num_blocks + i_block
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    start, token_0, _, _, n_k = locate_tile(
        i_block, cu_seqlens_ptr, num_seqs, T_k, T_k, 0, SELECT, 1, PACKED
    )
    row = (token_0 + start + o_n) * K + i_k
    m_n = start + o_n < n_k
    if SELECT % BN != 0:
        m_n = m_n & (o_n < SELECT)
    first = first_number(entry_offsets_ptr, i_list, segment) * SUMS
    entries = tl.load(entry_offsets_ptr + i_list + 1) - tl.load(entry_offsets_ptr + i_list)
    count = tl.cdiv(entries, segment) * SUMS
    if tl.program_id(2) < K:
        _sum_list(parts_k_ptr, dk_ptr, first, count, o_n, row, m_n, DK, DKP, SELECT)
    else:
        _sum_list(parts_v_ptr, dv_ptr, first, count, o_n, row, m_n, DV, DVP, SELECT)


@triton.jit
def _sum_list(
    parts_ptr,
    out_ptr,
    first,
    count,
    o_n,
    row,
    m_n,
    D: tl.constexpr,
    DP: tl.constexpr,
    SELECT: tl.constexpr,
):
    o_d = tl.arange(0, DP)
    mask = m_n[:, None] & (o_d < D)[None, :]
    p_part = parts_ptr + (first.to(tl.int64) * SELECT + o_n)[:, None] * D + o_d[None, :]
    b_sum = _sum(p_part, SELECT * D, count, mask)
    p_out = out_ptr + row[:, None] * D + o_d[None, :]
    tl.store(p_out, b_sum.to(out_ptr.dtype.element_ty), mask=mask)
