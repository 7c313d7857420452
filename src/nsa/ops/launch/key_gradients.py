"""Launches the key side of the backward: dk and dv of each branch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.hopper_key_gradients import (
    hopper_range_dkv_kernel,
    hopper_selected_dkv_kernel,
)
from nsa.kernels.key_gradients import range_dkv_kernel, selected_dkv_kernel
from nsa.ops.launch import hopper_key_gradients as hopper
from nsa.ops.launch.block_lists import invert
from nsa.ops.launch.branches import Branch, Geometry
from nsa.ops.launch.hopper_forward import takes
from nsa.ops.launch.sums import sum_lists, sum_parts
from nsa.ops.launch.tiles import (
    ENOUGH_PROGRAMS,
    QueryTiles,
    ceil_div,
    heads,
    key_tile,
    launch,
    next_power_of_2,
)
from nsa.ops.launch.tuned import tile


@dataclass(frozen=True)
class Rows:
    """Query rows of a branch: queries, output gradients, ``values [3, num_rows]`` of each."""

    q: Tensor
    do: Tensor
    values: Tensor

    def arguments(self, branch: Branch) -> dict[str, Tensor]:
        """Kernel arguments, with the branch's keys."""
        return {
            "q_ptr": self.q,
            "do_ptr": self.do,
            "k_ptr": branch.k,
            "v_ptr": branch.v,
            "rows_ptr": self.values,
        }

    def descriptors(self, branch: Branch) -> dict[str, TensorDescriptor | Tensor]:
        """The same as the copy engine of a Hopper GPU reads it."""
        return hopper.descriptors(self.q, self.do, branch.k, branch.v, self.values)


# Queries of a selected block whose sums one program adds up, for each of its sums. All queries
# choose the first block: in parts, its list takes no longer than the others.
MIN_PART, PART = 64, 1024
# Of compressed keys, which are few, and of which the first have the most queries.
ENOUGH_UNEVEN_PROGRAMS = 2048
MIN_SEGMENT, SEGMENT_UNIT, MAX_PARTS = 64, 16, 64


def segment_size(num_queries: int, programs: int, uneven: bool) -> int:
    """Queries that one program of a tile of keys walks, where a tile has ``num_queries`` at most.

    ``programs`` are those with one for each tile; if they are few, the queries are cut.
    """
    enough = ENOUGH_UNEVEN_PROGRAMS if uneven else ENOUGH_PROGRAMS
    parts = min(MAX_PARTS, max(1, enough // max(1, programs)))
    return max(MIN_SEGMENT, ceil_div(ceil_div(num_queries, parts), SEGMENT_UNIT) * SEGMENT_UNIT)


def range_dkv(
    rows: Rows,
    branch: Branch,
    geometry: Geometry,
    compressed: bool = False,
) -> tuple[Tensor, Tensor]:
    """``dk, dv`` of compressed keys, or of the keys of a window."""
    q = rows.q
    sizes = heads(q, branch.k, branch.v)
    shape = tile("range_dkv", sizes, q)
    on_hopper = takes(q, branch.k, branch.v, rows.do)
    keys = hopper.KEYS if on_hopper else shape.BN
    block, stride = geometry.spans(compressed)
    window = 0 if compressed else geometry.window_size
    num_tokens = q.shape[-3] + geometry.q_offset if compressed else branch.k.shape[-3]
    tiles = QueryTiles.of(q, geometry.cu_seqlens, keys * stride, num_tokens)
    # Queries that see a tile, at most.
    seen = q.shape[-3] if compressed else min(q.shape[-3], keys - 1 + window)
    segment = segment_size(seen, tiles.num_tiles * sizes["K"], uneven=compressed)
    num_parts = max(1, ceil_div(seen, segment))
    dtype = torch.float32 if num_parts > 1 else q.dtype
    # Programs write all keys of their tiles, but slots no sequence fills, and keys behind those
    # that queries reach, keep a gradient of zero.
    reached = (geometry.q_offset + q.shape[-3] - block) // stride + 1
    whole = q.numel() and geometry.cu_seqlens is None and branch.k.shape[-3] == reached
    make = torch.empty if whole else torch.zeros
    dk = make(num_parts, *branch.k.shape, dtype=dtype, device=q.device)
    dv = make(num_parts, *branch.v.shape, dtype=dtype, device=q.device)
    if q.numel() and branch.k.numel():
        grid = (tiles.num_tiles, sizes["K"], num_parts)
        common = {
            "dk_ptr": dk,
            "dv_ptr": dv,
            **tiles.arguments(),
            "num_rows": rows.values.shape[-1],
            "T_q": q.shape[-3],
            "T_k": num_tokens,
            "T_c": branch.k.shape[-3],
            **geometry.scalars(),
            "segment": segment,
            "part_dk": branch.k.numel(),
            "part_dv": branch.v.numel(),
        }
        if on_hopper:
            fast = hopper.range_arguments(sizes, block, stride, window)
            launch(hopper_range_dkv_kernel, grid, **rows.descriptors(branch), **common, **fast)
        else:
            plain = {**sizes, "BLOCK": block, "STRIDE": stride, "WINDOW": window}
            plain |= shape._asdict()
            launch(range_dkv_kernel, grid, **rows.arguments(branch), **common, **plain)
    if num_parts == 1:
        return dk[0], dv[0]
    dk, dv = sum_parts((dk, dv), q.dtype)
    return dk, dv


def selected_dkv(rows: Rows, branch: Branch, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """``dk, dv`` of the keys of selected blocks."""
    q = rows.q
    sizes = heads(q, branch.k, branch.v)
    num_kv_heads, size = sizes["K"], geometry.block_size
    shape = tile("selected_dkv", sizes, q)
    shape = shape._replace(BN=key_tile(shape.BN, size))
    # Of a batch every key is in a block.
    make = torch.zeros_like if geometry.cu_seqlens is not None else torch.empty_like
    dk, dv = make(branch.k), make(branch.v)
    assert branch.block_indices is not None, "the selected branch needs its block indices"
    if not q.numel():
        return dk.zero_(), dv.zero_()
    num_keys = branch.k.shape[-3]
    blocks = QueryTiles.of(q, geometry.cu_seqlens, size, num_keys)
    entries, entry_offsets = invert(branch.block_indices, q, blocks, num_keys)
    on_hopper = size == 64 and takes(q, branch.k, branch.v, rows.do)
    sums = 2 if on_hopper else 1
    num_entries = branch.block_indices.numel()
    part = sums * min(PART, max(MIN_PART, next_power_of_2(num_entries // 1024)))
    num_lists = num_kv_heads * blocks.num_tiles
    max_parts = num_lists + num_entries // part
    parts_k, parts_v = (
        q.new_empty(sums * max_parts, size, sizes[dim], dtype=torch.float32) for dim in ("DK", "DV")
    )
    where = {
        "entry_offsets_ptr": entry_offsets,
        **blocks.arguments(),
        "segment": part,
        "T_k": num_keys,
    }
    common = {
        "dk_ptr": parts_k,
        "dv_ptr": parts_v,
        "entries_ptr": entries,
        **where,
        "num_lists": num_lists,
        "num_rows": rows.values.shape[-1],
        "T_q": q.shape[-3],
        **geometry.scalars(),
    }
    if on_hopper:
        common |= {**rows.descriptors(branch), **hopper.selected_arguments(sizes)}
        launch(hopper_selected_dkv_kernel, (max_parts,), **common)
    else:
        common |= {**rows.arguments(branch), **sizes, "SELECT": size, **shape._asdict()}
        launch(selected_dkv_kernel, (max_parts, ceil_div(size, shape.BN)), **common)
    sum_lists((parts_k, parts_v), (dk, dv), sums, blocks, where)
    return dk, dv
