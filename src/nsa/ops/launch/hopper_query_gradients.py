"""Launches the Hopper kernel of ``dq``, where it applies."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.kernels.hopper_query_gradients import hopper_dq_kernel
from nsa.ops.launch.branches import Branch, Geometry
from nsa.ops.launch.hopper_forward import (
    SHARED_MEMORY,
    START,
    descriptor,
    piece,
    programs,
    takes,
)
from nsa.ops.launch.select_blocks import union_blocks
from nsa.ops.launch.tiles import QueryTiles, heads, launch

ROWS, KEYS = 128, 64  # Of a query tile and of a step, which is a selected block.
MAX_STAGES = 6


def applies(do: Tensor, q: Tensor, branches: dict[str, Branch], geometry: Geometry) -> bool:
    """As for the key side, with selection blocks of one step."""
    whole = "slc" not in branches or geometry.block_size == KEYS
    return whole and all(takes(q, b.k, b.v, do) for b in branches.values())


def dq(
    do: Tensor, q: Tensor, branches: dict[str, Branch], values: Tensor, geometry: Geometry
) -> Tensor:
    """Gradient of queries, ``[B, T, H, DK]`` or packed: see ``nsa.ops.launch.gradients``."""
    out = torch.empty_like(q)
    first = next(iter(branches.values()))
    sizes = heads(q, first.k, first.v)
    dims, width = sizes["DK"] + sizes["DV"], piece(sizes["DK"])
    tiles = QueryTiles.of(q, geometry.cu_seqlens, ROWS // sizes["GP"])
    indices = branches["slc"].block_indices if "slc" in branches else None
    union = union_blocks(indices, q, tiles, turns=True)
    descriptors = {
        f"{name}_desc": descriptor(
            x, (-1, *x.shape[-2:]), [tiles.tokens, sizes["GP"], piece(x.shape[-1])]
        )
        for name, x in (("q", q), ("do", do))
    }
    rows = {}  # That some query sees, of each branch.
    for name in ("cmp", "slc", "win"):
        # Of a branch that is not there, or of which nothing is visible, nothing is copied.
        branch = branches.get(name, first)
        keys = (branch.k, branch.v)
        if name in branches:
            keys = geometry.visible(branch, q, compressed=name == "cmp")
            rows[name] = keys[0].shape[-3]
        if not keys[0].numel():
            keys = (branch.k, branch.v)
        for letter, x in zip("kv", keys, strict=True):
            matrix = (-1, x.shape[-2] * x.shape[-1])
            box = [KEYS, piece(x.shape[-1])]
            descriptors[f"{letter}_{name}_desc"] = descriptor(x, matrix, box)
    stages = min(MAX_STAGES, (SHARED_MEMORY - ROWS * dims * 2) // (KEYS * dims * 2))
    used = ("cmp" in branches) + 2 * ("slc" in branches) + 4 * ("win" in branches)
    grid = programs(q.device, tiles.num_tiles * sizes["K"])
    launch(
        hopper_dq_kernel,
        grid,
        **descriptors,
        rows_ptr=values,
        dq_ptr=out,
        blocks_ptr=union[0],
        bits_ptr=union[1],
        counts_ptr=union[2],
        **tiles.places(),
        num_tiles=tiles.num_tiles,
        num_programs=grid[0],
        num_rows=values.shape[-1],
        T_q=q.shape[-3],
        T_k=rows.get("slc", rows.get("win", 0)),
        T_c=rows.get("cmp", 0),
        **geometry.scalars(),
        window=geometry.window_size,
        SHAPE=(
            *(sizes["H"], sizes["K"], sizes["G"], width, sizes["DV"]),
            *(geometry.compress_block_size, geometry.compress_stride),
            *(used, union[0] is q, stages, tiles.packed, sizes["DK"] // width, union[0].shape[-1]),
            sizes["GP"],
        ),
        **START,
    )
    return out
