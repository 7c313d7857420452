"""Sizes that every launch needs: heads and head dims, query tiles, where sequences start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

LOG2_E = 1.4426950408889634
# Programs that keep a GPU busy: about one for each multiprocessor, more would take turns.
ENOUGH_PROGRAMS = 128
EVERYTHING = 1 << 30  # Longer than any sequence, and positions added to it fit 32 bits.


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Starts a Triton kernel, every argument by name."""
    kernel[grid](**arguments)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def padded_dim(dim: int) -> int:
    """A head dim as tiles hold it: a power of two, 16 at least for ``tl.dot``."""
    return max(16, next_power_of_2(dim))


def key_tile(BN: int, block_size: int) -> int:
    """Keys of a step that walks a selection block: a power of two, 16 at least for ``tl.dot``."""
    return max(16, min(BN, next_power_of_2(block_size)))


def rows_a_token(q: Tensor, k: Tensor) -> int:
    """Rows that a token has in a tile: as many as a group has heads, or the next power of two."""
    return next_power_of_2(q.shape[-2] // k.shape[-2])


def heads(q: Tensor, k: Tensor, v: Tensor | None = None) -> dict[str, int]:
    """Head counts and head dims as kernel arguments."""
    num_heads, num_kv_heads, key_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    sizes = {
        "H": num_heads,
        "K": num_kv_heads,
        "G": num_heads // num_kv_heads,
        "GP": rows_a_token(q, k),
        "DK": key_dim,
        "DKP": padded_dim(key_dim),
    }
    if v is not None:
        sizes |= {"DV": v.shape[-1], "DVP": padded_dim(v.shape[-1])}
    return sizes


def reachable(x: Tensor, q: Tensor, q_offset: int, block: int, stride: int) -> Tensor:
    """Compressed blocks (or, as blocks of one, tokens) that some query sees, contiguous.

    What lies behind them in a batch may be anything, and tiles of keys are copied whole: a NaN
    there times a probability of 0 would be a NaN. Branches may have different numbers of them.
    """
    if q.dim() == 4:
        visible = max(0, (q_offset + q.shape[1] - block) // stride + 1)
        # Where all are visible a slice would cost the host as much as an operation.
        x = x if visible >= x.shape[1] else x[:, :visible]
    return x.contiguous()


@dataclass(frozen=True)
class QueryTiles:
    """Tiles of ``tokens`` consecutive queries, numbered over all sequences.

    Packed sequences of unknown lengths have ``total // tokens + num_seqs`` tiles, some of them
    without tokens, so nothing is read back from the device; see ``locate_tile``.
    """

    tokens: int
    num_tiles: int
    num_seqs: int
    cu_seqlens: Tensor
    packed: bool

    @classmethod
    def of(
        cls, q: Tensor, cu_seqlens: Tensor | None, tokens: int, length: int | None = None
    ) -> QueryTiles:
        """Tiles of q, ``[B, T, H, D]`` or packed ``[T, H, D]``.

        For tiles of keys, ``length`` says how many a sequence of a batch has.
        """
        if cu_seqlens is None:
            count = q.shape[0] * ceil_div(q.shape[1] if length is None else length, tokens)
            return cls(tokens, count, q.shape[0], q, False)
        num_seqs = cu_seqlens.shape[0] - 1
        count = q.shape[0] // tokens + num_seqs
        return cls(tokens, count, num_seqs, cu_seqlens.contiguous(), True)

    def places(self) -> dict:
        """Kernel arguments that locate a tile. Without packing the pointer is never read."""
        return {
            "cu_seqlens_ptr": self.cu_seqlens,
            "num_seqs": self.num_seqs,
        }

    def arguments(self) -> dict:
        """``places``, and whether sequences are packed."""
        return {**self.places(), "PACKED": self.packed}
