"""Launches the sums of float32 parts of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsa.kernels.sums import sum_lists_kernel, sum_parts_kernel
from nsa.ops.launch.tiles import QueryTiles, ceil_div, launch, next_power_of_2


def sum_parts(parts: Sequence[Tensor], dtype: torch.dtype, BN=1024) -> list[Tensor]:
    """Sums ``[parts, ...]`` over the first axis, in ``dtype``: of keys and values, or of one."""
    out = [torch.empty(x.shape[1:], dtype=dtype, device=x.device) for x in parts]
    sizes = [x.numel() for x in out]
    if max(sizes):
        launch(
            sum_parts_kernel,
            (ceil_div(max(sizes), BN), len(parts)),
            parts_k_ptr=parts[0],
            parts_v_ptr=parts[-1],
            out_k_ptr=out[0],
            out_v_ptr=out[-1],
            size_k=sizes[0],
            size_v=sizes[-1],
            count=parts[0].shape[0],
            BN=BN,
            num_warps=4,
        )
    return out


def sum_lists(
    parts: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    sums: int,
    blocks: QueryTiles,
    where: dict[str, Any],
    BN=16,
) -> None:
    """Adds the ``sums`` partial sums of each part of a block's list: ``dk`` and ``dv``.

    ``where``: kernel arguments that locate a list, see ``nsa.ops.launch.key_gradients``.
    """
    size, num_kv_heads = parts[0].shape[1], out[0].shape[-2]
    key_dim, value_dim = (x.shape[-1] for x in out)
    launch(
        sum_lists_kernel,
        (blocks.num_tiles, ceil_div(size, BN), 2 * num_kv_heads),
        parts_k_ptr=parts[0],
        parts_v_ptr=parts[1],
        dk_ptr=out[0],
        dv_ptr=out[1],
        **where,
        num_blocks=blocks.num_tiles,
        SUMS=sums,
        K=num_kv_heads,
        DK=key_dim,
        DV=value_dim,
        DKP=next_power_of_2(key_dim),
        DVP=next_power_of_2(value_dim),
        SELECT=size,
        BN=BN,
        num_warps=8,
    )
