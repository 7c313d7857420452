"""Tile sizes of each kernel: measured ones from ``kernels/tuned``, safe ones otherwise.

``nsa bench tune`` writes the tables; nothing is tuned on a user's machine, and sizes without a
measured tile are logged once (level info). A table lists, for each kernel, entries of
``{"key_dim", "value_dim", "group", "tile": [BM, BN, num_warps, num_stages]}``. Dims and group are
padded to powers of two. Widths that were not measured take the tile of the next wider ones, which
fits them too; groups that of the nearest one.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Kernels that walk lists of blocks with one membership bit per token of the tile.
WITH_BITS = ("token_attention_fwd", "dq")
MAX_TOKENS = 64  # Bits of an int64.


class Tile(NamedTuple):
    """Query rows and keys of a step, and how the compiler schedules it."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


def tile(kernel: str, sizes: dict[str, int], like: Tensor) -> Tile:
    """The tile of a kernel for head dims, group size, dtype and device.

    Args:
        kernel: name in the table.
        sizes: ``GP``, ``DKP`` and ``DVP`` as ``nsa.ops.launch.tiles.heads`` gives them.
        like: a tensor of the dtype and on the device that the kernel runs with.
    """
    found = _measured(kernel, sizes, like)
    if found is None:
        _say_once(kernel, sizes["DKP"], sizes.get("DVP", 0), sizes["GP"], like.dtype)
        found = _safe(sizes, like)
    return fitted(kernel, found, sizes["GP"])


@cache
def _say_once(kernel: str, key_dim: int, value_dim: int, group: int, dtype: torch.dtype) -> None:
    logger.info(
        "%s: no measured tile for widths %d and %d, groups of %d and %s; taking a safe one. "
        "nsa bench tune measures tiles of 16-bit kernels.",
        *(kernel, key_dim, value_dim, group, dtype),
    )


def fitted(kernel: str, found: Tile, group: int) -> Tile:
    """A tile with rows for all heads of a token, and for no more tokens than there are bits."""
    rows = max(found.BM, group)
    return found._replace(BM=min(rows, MAX_TOKENS * group) if kernel in WITH_BITS else rows)


def capability(like: Tensor) -> int:
    """Major compute capability of the GPU that holds a tensor: 9 for Hopper, 0 without a GPU."""
    return _major(like.device) if like.is_cuda else 0


@cache  # A layer's backward asks a dozen times, and PyTorch looks it up anew each time.
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _measured(kernel: str, sizes: dict[str, int], like: Tensor) -> Tile | None:
    """That of the least widths that hold these, and there of the nearest group size.

    A tile with fewer rows than the group has heads would get rows that no one measured.
    """
    if like.element_size() != 2:
        return None
    key_dim, value_dim, group = sizes["DKP"], sizes.get("DVP", 0), sizes["GP"]

    def distance(entry: dict) -> tuple[int, int, int]:
        """Doublings of the widths, of the group; of two groups as near, the larger one is taken."""
        wider = doublings(entry["key_dim"], key_dim) + doublings(entry["value_dim"], value_dim)
        return wider, abs(doublings(entry["group"], group)), -entry["group"]

    def doublings(to: int, start: int) -> int:
        return to.bit_length() - start.bit_length()

    fitting = [
        entry
        for entry in table(f"sm{capability(like)}0").get(kernel, [])
        if key_dim <= entry["key_dim"]
        and value_dim <= entry["value_dim"]
        and group <= entry["tile"][0]
    ]
    return Tile(*min(fitting, key=distance)["tile"]) if fitting else None


def _safe(sizes: dict[str, int], like: Tensor) -> Tile:
    """Fits the 99 KiB of shared memory of the smallest supported GPUs."""
    bytes_per_row = max(sizes["DKP"], sizes.get("DVP", 0)) * like.element_size()
    if bytes_per_row <= 256:
        return Tile(64, 32, 4, 2)
    return Tile(32, 32, 4, 2) if bytes_per_row <= 512 else Tile(16, 16, 4, 1)


@cache
def table(arch: str) -> dict[str, list[dict]]:
    """The launch table of an architecture, empty if there is none."""
    path = files("nsa.kernels") / "tuned" / f"{arch}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
