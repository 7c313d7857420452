"""Packed sequences: one tensor of tokens, cut by ``cu_seqlens``, whose pieces never see each other.

Compressed blocks of packed sequences live in *slots*. Sequence ``b`` starts at slot
``cu_seqlens[b] // stride`` and fills one slot per compressed block. It never reaches the next
sequence's first slot, since ``n`` tokens hold at most ``n // stride`` blocks; so
``total_tokens // stride`` slots suffice whatever the lengths are, and nobody has to read the
lengths back from the device to allocate them. Slots no sequence fills hold zeros: they are never
visible, but must be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

TOKENS, SLOTS, SHARED = "tokens", "slots", "shared"


def num_slots(num_tokens: int, compress_stride: int) -> int:
    """Compressed slots of a packed tensor of ``num_tokens`` tokens."""
    return num_tokens // compress_stride


def map_sequences(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[tuple[Tensor | None, str]],
    output_axes: Sequence[str],
    *,
    cu_seqlens: Tensor,
    compress_block_size: int,
    compress_stride: int,
) -> tuple[Tensor, ...]:
    """Runs a batched function on each sequence of packed tensors and packs what it returns.

    Args:
        function: takes ``[1, n, ...]`` tensors, returns ``[1, n, ...]`` tensors; must accept
            ``n = 0``.
        inputs: tensors and what their first axis counts: ``TOKENS``, ``SLOTS``, or ``SHARED`` for a
            tensor that is passed whole to every call (a weight).
        output_axes: the same for each output; ``SHARED`` outputs (gradients of weights) are summed
            over sequences.
        cu_seqlens: int32 ``[num_seqs + 1]``.
        compress_block_size: tokens per compressed block.
        compress_stride: tokens between compressed blocks.
    """
    bounds = cu_seqlens.tolist()
    total = bounds[-1]
    sizes = {TOKENS: total, SLOTS: num_slots(total, compress_stride)}

    def call(cuts: dict[str, slice]) -> tuple[Tensor, ...]:
        return function(
            *[x if x is None or axis == SHARED else x[cuts[axis]][None] for x, axis in inputs]
        )

    def empty_like_output(piece: Tensor, axis: str) -> Tensor:
        return (
            torch.zeros_like(piece)
            if axis == SHARED
            else piece.new_zeros(sizes[axis], *piece.shape[2:])
        )

    nothing = call({TOKENS: slice(0, 0), SLOTS: slice(0, 0)})
    outputs = [
        empty_like_output(piece, axis) for piece, axis in zip(nothing, output_axes, strict=True)
    ]
    for start, stop in pairwise(bounds):
        length, slot = stop - start, start // compress_stride
        blocks = (
            0
            if length < compress_block_size
            else (length - compress_block_size) // compress_stride + 1
        )
        cuts = {TOKENS: slice(start, stop), SLOTS: slice(slot, slot + blocks)}
        for whole, piece, axis in zip(outputs, call(cuts), output_axes, strict=True):
            if axis == SHARED:
                whole += piece
            else:
                whole[cuts[axis]] = piece[0]
    return tuple(outputs)
