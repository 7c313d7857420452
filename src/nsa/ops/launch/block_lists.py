"""The selection turned round: for each block, the queries that chose it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.ops.launch.tiles import ceil_div


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
