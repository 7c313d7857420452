"""Launches the key side of the backward: dk and dv of each branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa.kernels.key_gradients import range_dkv_kernel, selected_dkv_kernel, sum_parts_kernel
from nsa.ops.launch.branches import Branch, Geometry
from nsa.ops.launch.tiles import (
    LOG2_E,
    QueryTiles,
    ceil_div,
    heads,
    key_tile,
    launch,
    next_power_of_2,
)
from nsa.ops.launch.tuned import tile

EVERYTHING = 1 << 30  # Longer than any sequence.
Rows = dict[str, Any]  # Kernel arguments of the query rows and of the branch's keys.

PART = 1024  # Queries of a selected block whose sums one program adds up.
# Programs that keep a GPU busy: compressed keys are few, so their queries are cut into segments.
MIN_PROGRAMS, MIN_SEGMENT = 2048, 256


def segment_size(num_queries: int, key_tiles: int) -> int:
    """Queries that one program of a tile of compressed keys walks: a power of two."""
    parts = max(1, MIN_PROGRAMS // max(1, key_tiles))
    return max(MIN_SEGMENT, next_power_of_2(ceil_div(num_queries, parts)))


def range_dkv(
    rows: Rows,
    q: Tensor,
    branch: Branch,
    geometry: Geometry,
    compressed: bool = False,
) -> tuple[Tensor, Tensor]:
    """``dk, dv`` of compressed keys, or of the keys of a window."""
    sizes = heads(q, branch.k, branch.v)
    shape = tile("range_dkv", sizes, q)
    block, stride = (
        (geometry.compress_block_size, geometry.compress_stride) if compressed else (1, 1)
    )
    segment, num_parts = EVERYTHING, 1
    if compressed and q.numel():
        segment = segment_size(q.shape[-3], ceil_div(branch.k.numel(), shape.BN * sizes["DK"]))
        num_parts = ceil_div(q.shape[-3], segment)
    dtype = torch.float32 if compressed else q.dtype
    # Slots no sequence fills, and keys no query reaches, keep a gradient of zero.
    whole = geometry.cu_seqlens is None and not compressed
    make = torch.empty if whole and q.shape[-3] == branch.k.shape[-3] else torch.zeros
    dk = make(num_parts, *branch.k.shape, dtype=dtype, device=q.device)
    dv = make(num_parts, *branch.v.shape, dtype=dtype, device=q.device)
    if q.numel() and branch.k.numel():
        num_tokens = q.shape[-3] + geometry.q_offset
        tiles = QueryTiles.of(q, geometry.cu_seqlens, shape.BN * stride, num_tokens)
        launch(
            range_dkv_kernel,
            (tiles.num_tiles, sizes["K"], num_parts),
            **rows,
            dk_ptr=dk,
            dv_ptr=dv,
            **tiles.arguments(),
            T_q=q.shape[-3],
            T_k=num_tokens,
            T_c=branch.k.shape[-3],
            q_offset=geometry.q_offset,
            scale_log2=geometry.softmax_scale * LOG2_E,
            scale=geometry.softmax_scale,
            segment=segment,
            part_dk=branch.k.numel(),
            part_dv=branch.v.numel(),
            **sizes,
            BLOCK=block,
            STRIDE=stride,
            WINDOW=0 if compressed else geometry.window_size,
            **shape._asdict(),
        )
    if num_parts == 1:
        return dk[0].to(q.dtype), dv[0].to(q.dtype)
    return dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype)


def selected_dkv(
    rows: Rows,
    q: Tensor,
    branch: Branch,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """``dk, dv`` of the keys of selected blocks."""
    sizes = heads(q, branch.k, branch.v)
    shape = tile("selected_dkv", sizes, q)
    num_kv_heads, size = sizes["K"], geometry.block_size
    dk, dv = torch.zeros_like(branch.k), torch.zeros_like(branch.v)
    assert branch.block_indices is not None, "the selected branch needs its block indices"
    if not q.numel():
        return dk, dv
    blocks = block_table(branch.k, q, geometry.cu_seqlens, size)
    num_lists = num_kv_heads * blocks.num_blocks
    entries, entry_offsets = invert(branch.block_indices, blocks, num_kv_heads)
    counts = entry_offsets[1:] - entry_offsets[:-1]
    part_offsets = torch.zeros_like(entry_offsets)
    part_offsets[1:] = torch.cumsum((counts + PART - 1) // PART, 0)
    max_parts = num_lists + branch.block_indices.numel() // PART
    parts_k = q.new_empty(max_parts, size, sizes["DK"], dtype=torch.float32)
    parts_v = q.new_empty(max_parts, size, sizes["DV"], dtype=torch.float32)
    shape = shape._replace(BN=key_tile(shape.BN, size))
    where = {
        "part_offsets_ptr": part_offsets,
        "first_key_ptr": blocks.first_key,
        "num_keys_ptr": blocks.num_keys,
    }
    launch(
        selected_dkv_kernel,
        (max_parts, ceil_div(size, shape.BN)),
        **rows,
        dk_ptr=parts_k,
        dv_ptr=parts_v,
        entries_ptr=entries,
        entry_offsets_ptr=entry_offsets,
        **where,
        first_query_ptr=blocks.first_query,
        num_lists=num_lists,
        q_offset=geometry.q_offset,
        scale_log2=geometry.softmax_scale * LOG2_E,
        scale=geometry.softmax_scale,
        segment=PART,
        **sizes,
        SELECT=size,
        **shape._asdict(),
    )
    for parts, out in ((parts_k, dk), (parts_v, dv)):
        launch(
            sum_parts_kernel,
            (blocks.num_blocks, num_kv_heads, ceil_div(size, shape.BN)),
            parts_ptr=parts,
            out_ptr=out,
            **where,
            num_blocks=blocks.num_blocks,
            K=num_kv_heads,
            D=out.shape[-1],
            DP=next_power_of_2(out.shape[-1]),
            SELECT=size,
            BN=shape.BN,
            num_warps=4,
        )
    return dk, dv


@dataclass(frozen=True)
class BlockTable:
    """Selection blocks of all sequences, numbered through.

    Sequence ``b``'s first number is ``cu_seqlens[b] // size + b``, which needs no lengths.
    ``first_key [2, blocks]``: row of the block's first key, and its position in the sequence.
    ``num_keys``: keys in it. ``first_query``: row of its sequence's first query. ``of_query``:
    number of the first block of each query's sequence.
    """

    num_blocks: int
    first_key: Tensor
    num_keys: Tensor
    first_query: Tensor
    of_query: Tensor


def block_table(k: Tensor, q: Tensor, cu_seqlens: Tensor | None, size: int) -> BlockTable:
    """Where each selection block lies."""
    device = q.device
    if cu_seqlens is None:
        batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
        per_seq = ceil_div(num_keys, size)
        numbers = torch.arange(batch * per_seq, device=device)
        seq, start = numbers // per_seq, numbers % per_seq * size
        first_key = seq * num_keys + start
        count = (num_keys - start).clamp(max=size)
        of_query = (torch.arange(batch, device=device) * per_seq).repeat_interleave(num_queries)
        return BlockTable(
            batch * per_seq, torch.stack((first_key, start)), count, seq * num_queries, of_query
        )
    bounds = cu_seqlens.long()
    num_seqs = bounds.shape[0] - 1
    first_number = bounds[:-1] // size + torch.arange(num_seqs, device=device)
    num_blocks = q.shape[0] // size + num_seqs
    numbers = torch.arange(num_blocks, device=device)
    seq = torch.searchsorted(first_number, numbers, right=True) - 1
    start = (numbers - first_number[seq]) * size
    count = (bounds[seq + 1] - bounds[seq] - start).clamp(0, size)
    rows = torch.arange(q.shape[0], device=device)
    of_query = first_number[torch.searchsorted(bounds[1:], rows, right=True)]
    return BlockTable(
        num_blocks, torch.stack((bounds[seq] + start, start)), count, bounds[seq], of_query
    )


def invert(block_indices: Tensor, blocks: BlockTable, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Query rows that chose each (kv head, block), ascending, and where each list starts (CSR)."""
    chosen = block_indices.view(-1, num_kv_heads, block_indices.shape[-1]).long()
    head = torch.arange(num_kv_heads, device=chosen.device)[None, :, None] * blocks.num_blocks
    num_lists = num_kv_heads * blocks.num_blocks
    lists = torch.where(chosen < 0, num_lists, chosen + blocks.of_query[:, None, None] + head)
    ranked, order = torch.sort(lists.int().view(-1), stable=True)
    entries = (order // (num_kv_heads * block_indices.shape[-1])).int()
    offsets = torch.searchsorted(
        ranked, torch.arange(num_lists + 1, device=chosen.device, dtype=torch.int32)
    )
    return entries, offsets
