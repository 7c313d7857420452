"""Launches compression: the kinds of phi, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa.ops.launch.block_products import (
    Sides,
    Spans,
    hidden,
    mean,
    position_gradients,
    slots,
    sum_blocks,
    token_gradients,
)
from nsa.ops.launch.gated_compression import gated_bwd, gated_fwd

Weights = Sequence[Tensor | None]  # As ``Sides``, of weights that some kinds do without.


def _together_or_apart(function: Callable) -> Callable:
    """Calls a function once with both sides if the same launches can take them, else with each.

    They can if the shapes agree and the kernels of the kind know two sides.
    """

    @functools.wraps(function)
    def run(*columns: Any, kind: str, **options: Any) -> list:
        *_, x, _, w1, _ = columns
        shapes = {(a.shape, None if b is None else b.shape) for a, b in zip(x, w1, strict=True)}
        if len(x) == 1 or (len(shapes) == 1 and kind != "gated"):
            return function(*columns, kind=kind, **options)
        sides = zip(*columns, strict=True)
        return [function(*([y] for y in side), kind=kind, **options)[0] for side in sides]

    return run


@_together_or_apart
def compress_fwd(
    x: Sides,
    pe: Weights,
    w1: Weights,
    w2: Weights,
    *,
    cu_seqlens: Tensor | None = None,
    kind: str,
    compress_block_size: int,
    compress_stride: int,
) -> list[Tensor]:
    """Compressed blocks of each side; like ``nsa.reference.compress_fwd`` of one."""
    x = [side.contiguous() for side in x]
    table = slots(x[0], cu_seqlens, compress_stride)
    blocks = Spans.of(x[0], table, compress_block_size, compress_block_size, compress_stride)
    out = [side.new_empty(*blocks.shape, *side.shape[-2:]) for side in x]
    if out[0].numel() == 0:
        return out
    if kind == "mean":
        mean(x, blocks, out)
        return out
    pe, w1 = _given(pe, kind), _given(w1, kind)
    if kind == "linear":
        hidden(x, pe, w1, blocks, out)
    elif kind == "gated":
        gated_fwd(x[0], pe[0], w1[0], blocks, out[0])
    else:
        assert kind == "mlp", f"unknown kind {kind!r}"
        w2 = _given(w2, kind)
        act = [side.new_empty(*out[0].shape[:-1], w1[0].shape[0]) for side in x]
        hidden(x, pe, w1, blocks, act, silu=True)
        mean(x, blocks, out, (pe, act, w2))
    return out


@_together_or_apart
def compress_bwd(
    dout: Sides,
    x: Sides,
    pe: Weights,
    w1: Weights,
    w2: Weights,
    *,
    cu_seqlens: Tensor | None = None,
    kind: str,
    compress_block_size: int,
    compress_stride: int,
) -> list[tuple[Tensor, ...]]:
    """Gradients of x, pe, w1 and w2 of each side; an empty tensor for each input that is None."""
    size, stride = compress_block_size, compress_stride
    x, dout = [side.contiguous() for side in x], [side.contiguous() for side in dout]
    table = slots(x[0], cu_seqlens, stride)
    blocks = Spans.of(x[0], table, size, size, stride)
    pieces = Spans.of(x[0], table, stride, size, stride)
    if dout[0].numel() == 0:
        sides = zip(x, pe, w1, w2, strict=True)
        return [tuple(_none(x[0]) if w is None else torch.zeros_like(w) for w in s) for s in sides]
    if cu_seqlens is not None:
        # Whatever came for the slots no sequence fills must not reach a sum.
        used = (table[2] >= size).view(-1, 1, 1)
        dout = [torch.where(used, side, 0) for side in dout]
    if kind == "mean":
        # Without a product this only moves memory: small tiles keep more of it in flight.
        dx = token_gradients(x, blocks, pieces, dout=dout, BM=32)
        return [(side, _none(side), _none(side), _none(side)) for side in dx]
    pe, w1 = _given(pe, kind), _given(w1, kind)
    if kind == "linear":
        dx = token_gradients(x, blocks, pieces, dhidden=dout, w1=w1)
        dpe, dw1 = position_gradients(dout, sum_blocks(dout), x, pe, w1, blocks)
        return [(*side, _none(x[0])) for side in zip(dx, dpe, dw1, strict=True)]
    if kind == "gated":
        return [(*gated_bwd(dout[0], x[0], pe[0], w1[0], blocks, pieces), _none(x[0]))]
    assert kind == "mlp", f"unknown kind {kind!r}"
    return _mlp_bwd(dout, x, pe, w1, _given(w2, kind), blocks, pieces)


def _mlp_bwd(
    dout: Sides, x: Sides, pe: Sides, w1: Sides, w2: Sides, blocks: Spans, pieces: Spans
) -> list[tuple[Tensor, ...]]:
    """``(dx, dpe, dw1, dw2)`` of each side."""
    shape = (blocks.num, x[0].shape[-2], w1[0].shape[0])
    act = [side.new_empty(shape) for side in x]
    all_dhidden = x[0].new_empty(len(x), *shape)
    dhidden = all_dhidden.unbind()
    hidden(x, pe, w1, blocks, act, silu=True, gradient=(dout, w2, dhidden))
    dx = token_gradients(x, blocks, pieces, dhidden=dhidden, w1=w1, dout=dout)
    sums = all_dhidden.sum(1, dtype=torch.float32).unbind()
    dpe, dw1 = position_gradients(dhidden, sums, x, pe, w1, blocks, sum_blocks(dout))
    # A plain product, which the host starts faster than a kernel and the sum of its parts.
    dw2 = [a.flatten(0, -2).mT @ b.flatten(0, -2) for a, b in zip(dout, act, strict=True)]
    return list(zip(dx, dpe, dw1, dw2, strict=True))


def _none(x: Tensor) -> Tensor:
    """What stands for the gradient of an input that is None."""
    return x.new_empty(0)


def _given(weights: Weights, kind: str) -> list[Tensor]:
    """Weights that a kind cannot do without, contiguous."""
    given = [weight.contiguous() for weight in weights if weight is not None]
    assert len(given) == len(weights), f"a weight of kind {kind!r} is missing"
    return given
