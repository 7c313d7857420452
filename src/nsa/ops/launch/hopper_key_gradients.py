"""Launches the Hopper kernels of the backward's key side, where they apply."""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.hopper_key_gradients import COMPRESSED, SELECTED, WINDOW
from nsa.ops.launch.hopper_forward import START, descriptor
from nsa.ops.launch.tiles import rows_a_token

KEYS = 128  # Of a tile: 64 for each of two warpgroups. Selected blocks have 64.
BM = 32  # Query rows of a step; 64 do not fit the registers.
MAX_STAGES = 8


def stages(sizes: dict[str, int], key_tiles: int) -> int:
    """Buffers of the ring: an even number, as many as help and fit."""
    step = BM * ((sizes["DK"] + sizes["DV"]) * 2 + 16)  # 16: what is known of a row.
    keys = key_tiles * 64 * (sizes["DK"] + sizes["DV"]) * 2
    return min(MAX_STAGES, (220 * 1024 - keys) // step // 2 * 2)


def descriptors(
    q: Tensor, do: Tensor, k: Tensor, v: Tensor, values: Tensor
) -> dict[str, TensorDescriptor | Tensor]:
    """What the copy engine reads: rows of one token, as many as a step has, tiles of 64 keys."""
    rows = min(rows_a_token(q, k), BM)
    return {
        "q_desc": descriptor(q, (-1, q.shape[-1]), [rows, 64]),
        "do_desc": descriptor(do, (-1, do.shape[-1]), [rows, 64]),
        "k_desc": descriptor(k, (-1, k.shape[-2] * k.shape[-1]), [64, 64]),
        "v_desc": descriptor(v, (-1, v.shape[-2] * v.shape[-1]), [64, 64]),
        "rows_ptr": values,
    }


def range_arguments(sizes: dict[str, int], block: int, stride: int, window: int) -> dict:
    """Kernel arguments that replace those of ``range_dkv_kernel``; compressed keys: window 0."""
    mode = WINDOW if window else COMPRESSED
    return {"window": window, **_arguments(sizes, stages(sizes, 2), stride, block, mode.value)}


def selected_arguments(sizes: dict[str, int]) -> dict:
    """Kernel arguments that replace those of ``selected_dkv_kernel``."""
    return _arguments(sizes, stages(sizes, 1), 1, 1, SELECTED.value)


def _arguments(sizes: dict[str, int], ring: int, stride: int, block: int, mode: int) -> dict:
    """``SHAPE`` is in the order of the kernels' entries of it."""
    pieces = (sizes["DK"] // 64, sizes["DV"] // 64)
    shape = (sizes["H"], sizes["G"], *pieces, BM, ring, stride, block, mode, sizes["GP"])
    return {"K": sizes["K"], "SHAPE": shape, **START}
