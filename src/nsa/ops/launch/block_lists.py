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
    number of the first block of each query's sequence, int32 ``[tokens]``, in a batch ``[batch,
    1]``.
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
        start = torch.arange(0, per_seq * size, size, device=device)
        first_row = torch.arange(0, batch * num_keys, num_keys, device=device)[:, None]
        first_key = torch.stack((first_row + start, start.expand(batch, -1)))
        count = (num_keys - start).clamp_(max=size).repeat(batch)
        first_query = torch.arange(0, batch * num_queries, num_queries, device=device)[:, None]
        first_query = first_query.expand(-1, per_seq).contiguous()
        number = torch.arange(0, batch * per_seq, per_seq, dtype=torch.int32, device=device)
        return BlockTable(batch * per_seq, first_key, count, first_query, number[:, None])
    bounds = cu_seqlens.long()
    num_seqs = bounds.shape[0] - 1
    first_number = bounds[:-1] // size + torch.arange(num_seqs, device=device)
    num_blocks = q.shape[0] // size + num_seqs
    numbers = torch.arange(num_blocks, device=device)
    seq = torch.searchsorted(first_number, numbers, right=True) - 1
    start = (numbers - first_number[seq]) * size
    count = (bounds[seq + 1] - bounds[seq] - start).clamp(0, size)
    rows = torch.arange(q.shape[0], device=device)
    of_query = first_number.int()[torch.searchsorted(bounds[1:], rows, right=True)]
    return BlockTable(
        num_blocks, torch.stack((bounds[seq] + start, start)), count, bounds[seq], of_query
    )


def invert(block_indices: Tensor, blocks: BlockTable, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Query rows that chose each (kv head, block), ascending, and where each list starts (CSR)."""
    n = block_indices.shape[-1]
    num_lists = num_kv_heads * blocks.num_blocks
    lists = torch.arange(num_lists + 1, device=block_indices.device, dtype=torch.int32)
    first = (blocks.of_query[..., None] + lists[: -1 : blocks.num_blocks])[..., None]
    chosen = (block_indices + first).masked_fill_(block_indices < 0, num_lists)
    ranked, order = torch.sort(chosen.view(-1), stable=True)
    entries = (order // (num_kv_heads * n)).int()
    return entries, torch.searchsorted(ranked, lists)
