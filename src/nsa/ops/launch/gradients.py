"""Launches the backward of the three branches: row values, dq, then dk and dv of each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nsa.kernels.query_gradients import dq_kernel, row_values_kernel
from nsa.ops.launch import hopper_query_gradients as hopper
from nsa.ops.launch.branches import Branch, Geometry
from nsa.ops.launch.key_gradients import Rows, range_dkv, selected_dkv
from nsa.ops.launch.select_blocks import union_blocks
from nsa.ops.launch.tiles import (
    EVERYTHING,
    QueryTiles,
    ceil_div,
    heads,
    key_tile,
    launch,
    next_power_of_2,
)
from nsa.ops.launch.tuned import tile

NAMES = ("cmp", "slc", "win")


def attention_bwd(
    do: Tensor,
    q: Tensor,
    branches: dict[str, Branch],
    gates: Tensor | None,
    geometry: Geometry,
    dlse: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients ``dq``, ``dgates``, ``dk_<branch>`` and ``dv_<branch>`` of the branches given.

    The branches are named "cmp", "slc" and "win".
    """
    do, q = do.contiguous(), q.contiguous()
    gates = None if gates is None else gates.contiguous()
    branches = {name: branch.contiguous() for name, branch in branches.items()}
    geometry = replace(geometry, window_size=min(geometry.window_size, EVERYTHING))
    values, dgates = _row_values(do, branches, gates, dlse)
    grads = {"dq": _dq(do, q, branches, values, geometry)}
    if dgates is not None:
        grads["dgates"] = dgates
    for name, branch in branches.items():
        rows = Rows(q, do, values[NAMES.index(name)])
        if branch.block_indices is not None:
            dk, dv = selected_dkv(rows, branch, geometry)
        elif name == "slc":
            dk, dv = range_dkv(rows, branch, replace(geometry, window_size=EVERYTHING))
        else:
            dk, dv = range_dkv(rows, branch, geometry, compressed=name == "cmp")
        grads[f"dk_{name}"], grads[f"dv_{name}"] = dk, dv
    return grads


def _row_values(
    do: Tensor, branches: dict[str, Branch], gates: Tensor | None, dlse: Tensor | None, R=32
) -> tuple[Tensor, Tensor | None]:
    """``rows [3, 3, num_rows]`` and ``dgates``: see ``row_values_kernel``."""
    num_rows = do.numel() // do.shape[-1]
    values = torch.empty(3, 3, num_rows, dtype=torch.float32, device=do.device)
    dgates = None if gates is None else torch.empty_like(gates)
    tensors = {
        f"{field}_{name}_ptr": getattr(branches[name], field) if name in branches else do
        for field in ("o", "lse")
        for name in NAMES
    }
    if num_rows:
        launch(
            row_values_kernel,
            (ceil_div(num_rows, R),),
            do_ptr=do,
            **tensors,
            gates_ptr=do if gates is None else gates,
            dlse_ptr=do if dlse is None else dlse.contiguous(),
            rows_ptr=values,
            dgates_ptr=do if dgates is None else dgates,
            num_rows=num_rows,
            DV=do.shape[-1],
            DVP=next_power_of_2(do.shape[-1]),
            **{name.upper(): name in branches for name in NAMES},
            GATED=gates is not None,
            DLSE=dlse is not None,
            R=R,
            num_warps=8,
        )
    return values, dgates


def _dq(
    do: Tensor,
    q: Tensor,
    branches: dict[str, Branch],
    values: Tensor,
    geometry: Geometry,
) -> Tensor:
    if hopper.applies(do, q, branches, geometry):
        return hopper.dq(do, q, branches, values, geometry)
    dq = torch.empty_like(q)
    any_branch = next(iter(branches.values()))
    sizes = heads(q, any_branch.k, any_branch.v)
    shape = tile("dq", sizes, q)
    tiles = QueryTiles.of(q, geometry.cu_seqlens, shape.BM // sizes["GP"])
    slc = branches.get("slc")
    union = union_blocks(None if slc is None else slc.block_indices, q, tiles)
    tensors = {}
    for name in NAMES:
        keys = (q, q)
        if name in branches:
            keys = geometry.visible(branches[name], q, compressed=name == "cmp")
        tensors[f"k_{name}_ptr"], tensors[f"v_{name}_ptr"] = keys
    if q.numel():
        launch(
            dq_kernel,
            (tiles.num_tiles, sizes["K"]),
            q_ptr=q,
            do_ptr=do,
            **tensors,
            rows_ptr=values,
            dq_ptr=dq,
            blocks_ptr=union[0],
            bits_ptr=union[1],
            counts_ptr=union[2],
            **tiles.arguments(),
            num_rows=values.shape[-1],
            T_q=q.shape[-3],
            T_k=geometry.q_offset + q.shape[-3],
            T_c=tensors["k_cmp_ptr"].shape[-3] if "cmp" in branches else 0,
            **geometry.scalars(),
            **sizes,
            BLOCK=geometry.compress_block_size,
            STRIDE=geometry.compress_stride,
            SELECT=geometry.block_size,
            WINDOW=geometry.window_size,
            U=union[0].shape[-1],
            BS=key_tile(shape.BN, geometry.block_size),
            CMP="cmp" in branches,
            SLC=slc is not None,
            ALL=slc is not None and slc.block_indices is None,
            WIN="win" in branches,
            **shape._asdict(),
        )
    return dq
