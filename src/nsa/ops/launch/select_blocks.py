"""Launches the choice of blocks and the union lists of query tiles."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.select_blocks import (
    all_blocks_kernel,
    block_scores_kernel,
    top_blocks_kernel,
    union_blocks_kernel,
)
from nsa.ops.launch import hopper_forward
from nsa.ops.launch.tiles import (
    LOG2_E,
    QueryTiles,
    ceil_div,
    heads,
    launch,
    next_power_of_2,
    reachable,
)
from nsa.ops.launch.tuned import Tile, tile

SCORE_BYTES = 1 << 28  # of the score buffers of one chunk of queries
SCORES_PER_WARP = 2048  # of a query's, that registers hold
TOKENS_FILLED = 64  # whose choice one program writes, where it is all candidates


class Union(NamedTuple):
    """Distinct blocks of each query tile: see ``union_blocks_kernel``."""

    blocks: Tensor
    bits: Tensor
    counts: Tensor


def covers(q: Tensor, config: NSAConfig, max_seqlen: int | None, q_offset: int) -> bool:
    """Whether every query's candidates fit its list, so that selection is causal attention."""
    longest = q.shape[-3] if max_seqlen is None else min(q.shape[-3], max_seqlen)
    return q_offset + longest <= config.num_selected_blocks * config.block_size


def _all_candidates(
    indices: Tensor, q: Tensor, cu_seqlens: Tensor | None, config: NSAConfig, q_offset: int
) -> Tensor:
    """Fills in what ``select_blocks`` gives where the candidates fit the list."""
    num_kv_heads, n = indices.shape[-2:]
    tiles = QueryTiles.of(q, cu_seqlens, TOKENS_FILLED)
    launch(
        all_blocks_kernel,
        (tiles.num_tiles, num_kv_heads),
        indices_ptr=indices,
        **tiles.arguments(),
        T_q=q.shape[-3],
        q_offset=q_offset,
        K=num_kv_heads,
        N=n,
        SELECT=config.block_size,
        NP=next_power_of_2(n),
        BQ=tiles.tokens,
        num_warps=4,
    )
    return indices


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    config: NSAConfig,
    softmax_scale: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    q_offset: int = 0,
) -> Tensor:
    """``block_indices``."""
    num_kv_heads, n = k_cmp.shape[-2], config.num_selected_blocks
    indices = q.new_empty((*q.shape[:-2], num_kv_heads, n), dtype=torch.int32)
    if q.numel() == 0:
        return indices
    if covers(q, config, max_seqlen, q_offset):
        return _all_candidates(indices, q, cu_seqlens, config, q_offset)
    indices.fill_(-1)
    q, lse = q.contiguous(), lse.contiguous()
    k_cmp = reachable(k_cmp, q, q_offset, config.compress_block_size, config.compress_stride)
    sizes = heads(q, k_cmp)
    per_block = config.block_size // config.compress_stride
    padded = max(2, next_power_of_2(per_block))
    on_hopper = hopper_forward.has_scores(q, k_cmp, per_block)
    if on_hopper:
        shape, write_scores = hopper_forward.SCORES, hopper_forward.block_scores
    else:
        shape = tile("block_scores", sizes, q)
        shape = shape._replace(BN=max(shape.BN, padded))
        write_scores = partial(_block_scores, shape=shape, padded=padded)
    tiles = QueryTiles.of(q, cu_seqlens, shape.BM // sizes["GP"])
    # Rows hold whole steps, and start where vectors of scores can be read.
    unit = max(16, shape.BN // padded)
    stride_row = ceil_div(config.num_blocks(q_offset + q.shape[-3]), unit) * unit
    tile_bytes = tiles.tokens * sizes["K"] * stride_row * 8
    per_chunk = max(1, SCORE_BYTES // tile_bytes)
    if on_hopper:
        per_chunk = hopper_forward.whole_rounds(per_chunk, sizes["K"], q.device)
    per_chunk = min(tiles.num_tiles, per_chunk)
    # Rows are read in powers of two from one before: there is room behind the last, and before.
    room = per_chunk * tile_bytes // 8 + max(32, next_power_of_2(stride_row))
    own, following = torch.empty(2, room, dtype=torch.float32, device=q.device)
    common = {
        **tiles.arguments(),
        "BLOCK": config.compress_block_size,
        "STRIDE": config.compress_stride,
        "SELECT": config.block_size,
        "own_ptr": own,
        "next_ptr": following,
        "T_q": q.shape[-3],
        "q_offset": q_offset,
        "stride_row": stride_row,
    }
    for first in range(0, tiles.num_tiles, per_chunk):
        count = min(per_chunk, tiles.num_tiles - first)
        columns = config.num_blocks(q_offset + _reach(q, (first + count) * tiles.tokens))
        chunk = {**common, "first_tile": first}
        write_scores(q, k_cmp, lse, softmax_scale=softmax_scale, num_tiles=count, common=chunk)
        _top_blocks(indices, count * tiles.tokens, columns, tiles.tokens, config, chunk)
    return indices


def _top_blocks(
    indices: Tensor,
    num_rows: int,
    columns: int,
    tokens: int,
    config: NSAConfig,
    common: dict[str, Any],
) -> None:
    """Chooses from the sums of a chunk, rows of ``columns`` blocks at most."""
    num_kv_heads, n = indices.shape[-2:]
    row = max(32, next_power_of_2(columns))
    launch(
        top_blocks_kernel,
        (num_rows, num_kv_heads),
        indices_ptr=indices,
        K=num_kv_heads,
        N=n,
        NUM_INIT=config.num_init_blocks,
        NUM_LOCAL=config.num_local_blocks,
        NP=next_power_of_2(n),
        BQ=tokens,
        NBP=row,
        **common,
        num_warps=min(16, max(1, row // SCORES_PER_WARP)),
    )


def _block_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    num_tiles: int,
    common: dict[str, Any],
    shape: Tile,
    padded: int,
) -> None:
    """Writes the sums of a chunk of tiles, blocks of ``padded`` keys."""
    launch(
        block_scores_kernel,
        (num_tiles, k_cmp.shape[-2]),
        q_ptr=q,
        k_ptr=k_cmp,
        lse_ptr=lse,
        T_c=k_cmp.shape[-3],
        scale_log2=softmax_scale * LOG2_E,
        **heads(q, k_cmp),
        SP=padded,
        **shape._asdict(),
        **common,
    )


def _reach(q: Tensor, tokens: int) -> int:
    """Queries of one sequence that the first ``tokens`` queries of the tiles can cover."""
    one_sequence = q.dim() == 4 and q.shape[0] == 1
    return min(tokens, q.shape[-3]) if one_sequence else q.shape[-3]


def union_blocks(
    block_indices: Tensor | None, q: Tensor, tiles: QueryTiles, turns: bool = False
) -> Union:
    """Union lists of the tiles of ``block_indices [..., K, n]``; q in their place if it is None.

    ``turns``: for kernels that give each half of a tile's tokens to a warp group.
    """
    if block_indices is None or q.numel() == 0:
        return Union(q, q, q)
    num_kv_heads, n = block_indices.shape[-2:]
    width = next_power_of_2(tiles.tokens * n)
    device = block_indices.device
    union = Union(
        torch.empty(tiles.num_tiles, num_kv_heads, width, dtype=torch.int32, device=device),
        torch.empty(tiles.num_tiles, num_kv_heads, width + 1, dtype=torch.int64, device=device),
        torch.empty(tiles.num_tiles, num_kv_heads, dtype=torch.int32, device=device),
    )
    launch(
        union_blocks_kernel,
        (tiles.num_tiles, num_kv_heads),
        indices_ptr=block_indices,
        blocks_ptr=union.blocks,
        bits_ptr=union.bits,
        counts_ptr=union.counts,
        **tiles.arguments(),
        T_q=q.shape[-3],
        K=num_kv_heads,
        N=n,
        BQ=tiles.tokens,
        U=width,
        TURNS=turns,
        num_warps=1,
    )
    return union
