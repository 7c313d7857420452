"""The selection turned round: for each block, the queries that chose it."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.kernels.key_gradients import list_numbers_kernel
from nsa.ops.launch.tiles import QueryTiles, launch, next_power_of_2


def invert(
    block_indices: Tensor, q: Tensor, blocks: QueryTiles, num_keys: int
) -> tuple[Tensor, Tensor]:
    """Query rows that chose each (kv head, block), ascending, and where each list starts (CSR).

    ``blocks``: the tiles of keys, ``num_keys`` of a sequence of a batch; int32 both.
    """
    num_kv_heads, n = block_indices.shape[-2:]
    num_lists = num_kv_heads * blocks.num_tiles
    # Sorting takes a pass for every byte of a number.
    dtype = torch.int16 if num_lists < 1 << 15 else torch.int32
    numbers = torch.empty_like(block_indices, dtype=dtype)
    queries = QueryTiles.of(q, blocks.cu_seqlens if blocks.packed else None, blocks.tokens)
    launch(
        list_numbers_kernel,
        (queries.num_tiles, num_kv_heads),
        indices_ptr=block_indices,
        numbers_ptr=numbers,
        **queries.arguments(),
        num_blocks=blocks.num_tiles,
        T_q=q.shape[-3],
        T_k=num_keys,
        K=num_kv_heads,
        N=n,
        E=next_power_of_2(blocks.tokens * n),
        SELECT=blocks.tokens,
        num_warps=4,
    )
    ranked, order = torch.sort(numbers.view(-1), stable=True)
    lists = torch.arange(num_lists + 1, device=q.device, dtype=dtype)
    entries = torch.empty(order.shape, dtype=torch.int32, device=q.device)
    torch.floor_divide(order, num_kv_heads * n, out=entries)
    return entries, torch.searchsorted(ranked, lists, out_int32=True)
