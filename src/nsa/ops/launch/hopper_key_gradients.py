"""Launches the Hopper kernels of the backward's key side, where they apply."""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.ops.launch.tuned import capability

KEYS = 128  # Of a tile: 64 for each of two warpgroups. Selected blocks have 64.
BM = 32  # Query rows of a step; 64 do not fit the registers.


def applies(q: Tensor, v: Tensor, sizes: dict[str, int]) -> bool:
    """Hopper, 16-bit, head dims of 64 or 128, and groups whose rows fill the swizzle's pattern."""
    return (
        capability(q) == 9
        and q.element_size() == 2
        and {q.shape[-1], v.shape[-1]} <= {64, 128}
        and sizes["G"] in (8, 16, 32)
    )


def stages(sizes: dict[str, int], key_tiles: int) -> int:
    """Buffers of the ring: an even number, as many as help and fit."""
    step = BM * (sizes["DK"] + sizes["DV"]) * 2
    keys = key_tiles * 64 * (sizes["DK"] + sizes["DV"]) * 2
    return min(6, (220 * 1024 - keys) // step // 2 * 2)


def descriptors(
    q: Tensor, do: Tensor, k: Tensor, v: Tensor, values: Tensor, group: int
) -> dict[str, TensorDescriptor | Tensor]:
    """What the copy engine reads: rows of queries one kv head wide, tiles of 64 keys."""
    return {
        "q_desc": _matrix(q.view(-1, q.shape[-1]), group),
        "do_desc": _matrix(do.view(-1, do.shape[-1]), group),
        "k_desc": _matrix(k.view(-1, k.shape[-2] * k.shape[-1]), 64),
        "v_desc": _matrix(v.view(-1, v.shape[-2] * v.shape[-1]), 64),
        "rows_ptr": values,
    }


def _matrix(x: Tensor, rows: int) -> TensorDescriptor:
    layout = NVMMASharedLayout(128, 16, rank=2)
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], [rows, 64], layout)


def range_arguments(sizes: dict[str, int], block: int, stride: int) -> dict:
    """Kernel arguments that replace those of ``range_dkv_kernel``, for compressed keys."""
    return _arguments(sizes, stages(sizes, 2), stride, block, selected=False)


def selected_arguments(sizes: dict[str, int]) -> dict:
    """Kernel arguments that replace those of ``selected_dkv_kernel``."""
    return _arguments(sizes, stages(sizes, 1), 1, 1, selected=True)


def _arguments(sizes: dict[str, int], ring: int, stride: int, block: int, selected: bool) -> dict:
    """``SHAPE`` is in the order of the kernels' entries of it."""
    pieces = (sizes["DK"] // 64, sizes["DV"] // 64)
    shape = (sizes["H"], sizes["G"], *pieces, BM, ring, stride, block, selected)
    return {"K": sizes["K"], "SHAPE": shape, "num_warps": 4}
