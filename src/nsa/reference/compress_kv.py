"""Compression: a learned phi maps each block of ``l`` keys (or values) to one (eq. 7).

All kinds start at mean pooling with the weights of ``nsa.layers.Compressor``. With ``x`` the block
plus its intra-block positions, ``[l, D]``:

* ``mean``: ``mean(x)``, no weights and no positions.
* ``linear``: ``W1 flatten(x)``, ``W1 [D, l * D]``.
* ``gated``: ``sum_s softmax_s(W1 x_s) * x_s``, a softmax over the block for each channel,
  ``W1 [D, D]``.
* ``mlp``: ``mean(x) + W2 silu(W1 flatten(x))``, ``W1 [F, l * D]``, ``W2 [D, F]``.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import silu

from nsa.reference.masked_attention import compute_dtype
from nsa.reference.packed import SHARED, SLOTS, TOKENS, map_sequences


def compress_fwd(
    x: Tensor,
    pe: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    kind: str,
    compress_block_size: int,
    compress_stride: int,
) -> Tensor:
    """Compressed blocks of ``x [B, T, K, D]``: ``[B, T_c, K, D]`` in x's dtype."""

    def batched(
        x: Tensor, pe: Tensor | None, w1: Tensor | None, w2: Tensor | None
    ) -> tuple[Tensor]:
        blocks = _blocks(x, pe, compress_block_size, compress_stride)
        return (_phi(blocks, _wide(w1), _wide(w2), kind).to(x.dtype),)

    if cu_seqlens is None:
        return batched(x, pe, w1, w2)[0]
    inputs = [(x, TOKENS), (pe, SHARED), (w1, SHARED), (w2, SHARED)]
    return map_sequences(
        batched,
        inputs,
        [SLOTS],
        cu_seqlens=cu_seqlens,
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
    )[0]


def compress_bwd(
    dout: Tensor,
    x: Tensor,
    pe: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    kind: str,
    compress_block_size: int,
    compress_stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, pe, w1 and w2; an empty tensor for each input that is None."""

    def batched(
        dout: Tensor, x: Tensor, pe: Tensor | None, w1: Tensor | None, w2: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        blocks = _blocks(x, pe, compress_block_size, compress_stride)
        dblocks, dw1, dw2 = _phi_bwd(_wide(dout), blocks, _wide(w1), _wide(w2), kind)
        dpe = dblocks.sum((0, 1)) if pe is not None else dblocks.new_empty(0)
        return _unblocks(dblocks, x, compress_stride), _as(dpe, pe), _as(dw1, w1), _as(dw2, w2)

    if cu_seqlens is None:
        return batched(dout, x, pe, w1, w2)
    inputs = [(dout, SLOTS), (x, TOKENS), (pe, SHARED), (w1, SHARED), (w2, SHARED)]
    dx, dpe, dw1, dw2 = map_sequences(
        batched,
        inputs,
        [TOKENS, SHARED, SHARED, SHARED],
        cu_seqlens=cu_seqlens,
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
    )
    return dx, dpe, dw1, dw2


def _phi(blocks: Tensor, w1: Tensor | None, w2: Tensor | None, kind: str) -> Tensor:
    """Compressed ``blocks [B, T_c, K, l, D]`` (the phi of eq. 7)."""
    if kind == "mean":
        return blocks.mean(-2)
    assert w1 is not None, f"kind {kind!r} needs w1"
    if kind == "linear":
        return blocks.flatten(-2) @ w1.mT
    if kind == "gated":
        return (torch.softmax(blocks @ w1.mT, dim=-2) * blocks).sum(-2)
    assert kind == "mlp", f"unknown kind {kind!r}"
    assert w2 is not None, "kind 'mlp' needs w2"
    return blocks.mean(-2) + silu(blocks.flatten(-2) @ w1.mT) @ w2.mT


def _phi_bwd(
    dout: Tensor, blocks: Tensor, w1: Tensor | None, w2: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the blocks, w1 and w2 of ``_phi``."""
    if kind == "mean":
        dblocks = (dout / blocks.shape[-2]).unsqueeze(-2).expand_as(blocks)
        return dblocks, dout.new_empty(0), dout.new_empty(0)
    assert w1 is not None, f"kind {kind!r} needs w1"
    if kind == "linear":
        return (dout @ w1).view_as(blocks), _outer(dout, blocks.flatten(-2)), dout.new_empty(0)
    if kind == "gated":
        weights = torch.softmax(blocks @ w1.mT, dim=-2)
        dweights = dout.unsqueeze(-2) * blocks
        dlogits = weights * (dweights - (weights * dweights).sum(-2, keepdim=True))
        dblocks = weights * dout.unsqueeze(-2) + dlogits @ w1
        return dblocks, _outer(dlogits, blocks), dout.new_empty(0)
    assert kind == "mlp", f"unknown kind {kind!r}"
    assert w2 is not None, "kind 'mlp' needs w2"
    hidden = blocks.flatten(-2) @ w1.mT
    gate = torch.sigmoid(hidden)
    dhidden = (dout @ w2) * (gate * (1 + hidden * (1 - gate)))
    dblocks = (dhidden @ w1).view_as(blocks) + (dout / blocks.shape[-2]).unsqueeze(-2)
    return dblocks, _outer(dhidden, blocks.flatten(-2)), _outer(dout, silu(hidden))


def _blocks(x: Tensor, pe: Tensor | None, size: int, stride: int) -> Tensor:
    """Overlapping blocks plus positions, ``[B, T, K, D] -> [B, T_c, K, l, D]``, compute dtype."""
    x = _wide(x)
    if x.shape[1] < size:
        return x.new_empty(x.shape[0], 0, x.shape[2], size, x.shape[3])
    blocks = x.unfold(1, size, stride).mT
    return blocks.contiguous() if pe is None else blocks + _wide(pe)


def _unblocks(dblocks: Tensor, x: Tensor, stride: int) -> Tensor:
    """Adds the gradients of overlapping blocks back onto their tokens; undoes ``_blocks``."""
    num_blocks, size = dblocks.shape[1], dblocks.shape[3]
    dx = torch.zeros(x.shape, dtype=dblocks.dtype, device=x.device)
    for first in range(0, size if num_blocks else 0, stride):
        pieces = dblocks[:, :, :, first : first + stride].transpose(2, 3).flatten(1, 2)
        dx[:, first : first + num_blocks * stride] += pieces
    return dx.to(x.dtype)


def _outer(dout: Tensor, x: Tensor) -> Tensor:
    """Weight gradient ``dout^T x`` over all leading axes."""
    return dout.flatten(0, -2).mT @ x.flatten(0, -2)


@overload
def _wide(x: Tensor) -> Tensor: ...
@overload
def _wide(x: None) -> None: ...
def _wide(x: Tensor | None) -> Tensor | None:
    """In the compute dtype."""
    return None if x is None else x.to(compute_dtype(x))


def _as(gradient: Tensor, parameter: Tensor | None) -> Tensor:
    return gradient if parameter is None else gradient.to(parameter.dtype)
