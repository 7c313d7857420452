"""Launches what the kinds of phi consist of: products and means of blocks, and their gradients.

Keys and values of the same shape go through one launch: see ``nsa.kernels.compress_kv``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from nsa.kernels.compress_kv import (
    hidden_kernel,
    locate_slots_kernel,
    mean_kernel,
    token_gradients_kernel,
    weight_gradients_kernel,
)
from nsa.ops.launch.sums import sum_parts
from nsa.ops.launch.tiles import ENOUGH_PROGRAMS, ceil_div, launch, padded_dim

Sides = Sequence[Tensor]  # Of keys and values, or of one of the two.


def both(**tensors: Sides) -> dict[str, Tensor]:
    """Kernel arguments ``<name>_k_ptr`` and ``<name>_v_ptr``, the same for one side alone."""
    return {
        f"{name}_{side}_ptr": sides[i]
        for name, sides in tensors.items()
        for side, i in (("k", 0), ("v", -1))
    }


@dataclass(frozen=True)
class Spans:
    """Spans of ``size`` tokens, one every ``stride``, in the layout of compressed blocks.

    ``table``: see ``nsa.kernels.compress_kv``; in a batch any tensor, and never read. ``shape``:
    leading axes of a tensor with one entry a span. ``seq``: tokens of a sequence of a batch.
    """

    table: Tensor
    packed: bool
    shape: tuple[int, ...]
    seq: int
    size: int
    block: int
    stride: int

    @classmethod
    def of(cls, x: Tensor, table: Tensor, size: int, block: int, stride: int) -> Spans:
        """Spans of ``x [B, T, K, D]``, or packed, in blocks of ``block``."""
        seq, packed = x.shape[-3], x.dim() == 3
        per_seq = max(0, seq - size + stride) // stride
        shape = (seq // stride,) if packed else (x.shape[0], per_seq)
        return cls(table, packed, shape, seq, size, block, stride)

    @property
    def num(self) -> int:
        """Spans of all sequences; packed, slots."""
        return prod(self.shape)

    @property
    def per_seq(self) -> int:
        """Spans of a sequence of a batch; packed, all slots, as if there were one."""
        return self.shape[-1]

    def arguments(self) -> dict:
        """Kernel arguments that locate a span."""
        return {
            "table_ptr": self.table,
            "num": self.num,
            "T": self.seq,
            "per_seq": self.per_seq,
            "STRIDE": self.stride,
            "PACKED": self.packed,
        }


def slots(x: Tensor, cu_seqlens: Tensor | None, stride: int, BN=256) -> Tensor:
    """The table of packed sequences, see ``nsa.kernels.compress_kv``; ``x`` for a batch."""
    num = x.shape[-3] // stride
    if cu_seqlens is None or num == 0:
        return x
    table = torch.empty(3, num, dtype=torch.int64, device=x.device)
    num_seqs = cu_seqlens.shape[0] - 1
    launch(
        locate_slots_kernel,
        (ceil_div(num, BN),),
        table_ptr=table,
        cu_seqlens_ptr=cu_seqlens.contiguous(),
        num_seqs=num_seqs,
        search_steps=num_seqs.bit_length(),
        num=num,
        STRIDE=stride,
        BN=BN,
    )
    return table


def width(n: int, x: Tensor) -> int:
    """Columns of a tile that cover ``n`` with little waste.

    Exact float32 products run outside the tensor cores and hold their operands in registers: their
    tiles stay small.
    """
    if x.dtype == torch.float32:
        return 32 if n > 16 else 16
    if n <= 64:
        return padded_dim(n)
    return 128 if ceil_div(n, 64) % 2 == 0 else 64


def step(n: int, x: Tensor) -> int:
    """Terms of one step of a product over ``n``."""
    if x.dtype == torch.float32:
        return 16
    return next(step for step in (64, 32, 16) if n % step == 0 or step == 16)


def height(x: Tensor, rows: int) -> int:
    """Rows of a tile, ``rows`` unless the products are exact float32 ones."""
    return 32 if x.dtype == torch.float32 else rows


def hidden(
    x: Sides,
    pe: Sides,
    w1: Sides,
    blocks: Spans,
    out: Sides,
    *,
    silu: bool = False,
    gradient: tuple[Sides, Sides, Sides] | None = None,
    num_warps=4,
) -> None:
    """Fills ``out [..., K, F]``; with ``gradient = (dout, w2, dhidden)`` also dhidden."""
    K, D = x[0].shape[-2:]
    F = w1[0].shape[0]
    BM, BF = height(x[0], 64), min(64, width(F, x[0]))
    dout, w2, dhidden = gradient or (out, w1, out)
    grid = (ceil_div(blocks.num, BM - 1), ceil_div(F, BF), len(x) * K)
    launch(
        hidden_kernel,
        grid,
        **both(x=x, pe=pe, w1=w1, out=out, dout=dout, w2=w2, dhidden=dhidden),
        **blocks.arguments(),
        K=K,
        D=D,
        F=F,
        BLOCK=blocks.block,
        BM=BM,
        BF=BF,
        BK=step(D, x[0]),
        SILU=silu,
        GRAD=gradient is not None,
        num_warps=num_warps,
        # With a multiprocessor to itself, a program has memory to load far ahead.
        num_stages=5 if prod(grid) <= ENOUGH_PROGRAMS else 3,
    )


def mean(
    x: Sides,
    blocks: Spans,
    out: Sides,
    mlp: tuple[Sides, Sides, Sides] | None = None,
    BM=16,
    num_warps=4,
) -> None:
    """Fills ``out`` with means; ``mlp = (pe, act, w2)`` adds positions and ``W2 act``."""
    K, D = x[0].shape[-2:]
    pe, act, w2 = mlp or (x, x, x)
    F = act[0].shape[-1]
    BC = width(D, x[0])
    launch(
        mean_kernel,
        (ceil_div(blocks.num, BM), ceil_div(D, BC), len(x) * K),
        **both(x=x, pe=pe, act=act, w2=w2, out=out),
        **blocks.arguments(),
        K=K,
        D=D,
        F=F,
        BLOCK=blocks.block,
        BM=BM,
        BC=BC,
        BK=step(F, x[0]),
        MLP=mlp is not None,
        num_warps=num_warps,
    )


def token_gradients(
    x: Sides,
    blocks: Spans,
    pieces: Spans,
    *,
    dhidden: Sides | None = None,
    w1: Sides | None = None,
    dout: Sides | None = None,
    BM=128,
    num_warps=8,
    num_stages=3,
) -> list[Tensor]:
    """``dx``: through the hidden units (``dhidden`` and ``w1``), the mean (``dout``) or both."""
    K, D = x[0].shape[-2:]
    F = 1 if w1 is None else w1[0].shape[0]
    BM, BC = height(x[0], BM), width(D, x[0])
    # Tokens past the last piece of their sequence are in no block.
    full = not pieces.packed and pieces.seq % pieces.stride == 0
    dx = [torch.empty_like(side) if full else torch.zeros_like(side) for side in x]
    launch(
        token_gradients_kernel,
        (ceil_div(pieces.num * K, BM), blocks.stride * ceil_div(D, BC), len(x)),
        **both(dhidden=dhidden or x, w1=w1 or x, dout=dout or x, dx=dx),
        **pieces.arguments(),
        gap=pieces.per_seq - blocks.per_seq,
        scale=1.0 / blocks.block,
        K=K,
        D=D,
        F=F,
        BLOCK=blocks.block,
        BM=BM,
        BC=BC,
        BK=step(F, x[0]),
        HIDDEN=dhidden is not None,
        MEAN=dout is not None,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return dx


def position_gradients(
    dhidden: Sides,
    sums: Sides,
    x: Sides,
    pe: Sides,
    w1: Sides,
    blocks: Spans,
    dout_sums: Sides | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """``dpe`` and ``dw1`` of a product with flattened blocks; ``dout_sums`` of one with a mean.

    ``sums``: of ``dhidden`` over blocks, like ``sum_blocks``.
    """
    dpe = [torch.empty_like(side) for side in pe]
    positions = {
        **both(pe=pe, w1=w1, sums=sums, dout_sums=dout_sums or sums, dpe=dpe),
        "MEAN": dout_sums is not None,
    }
    return dpe, weight_gradients(dhidden, x, blocks, positions)


def sum_blocks(x: Sides) -> list[Tensor]:
    """``[..., K, C] -> [K, C]``, fp32."""
    return [side.sum(tuple(range(side.dim() - 2)), dtype=torch.float32) for side in x]


def weight_gradients(
    g: Sides,
    x: Sides,
    spans: Spans,
    positions: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    BM=64,
    num_warps=8,
    num_stages=3,
) -> list[Tensor]:
    """``sum g^T x [F, C]`` over rows, in ``dtype`` or that of ``x``.

    With ``positions``, kernel arguments, ``x`` are the flattened blocks with positions, whose
    gradients are written too.

    Enough parts to fill the device, none below a few hundred rows: memory does not grow with the
    length.
    """
    K, D = x[0].shape[-2:]
    F = g[0].shape[-1]
    dtype = dtype or x[0].dtype
    size = spans.block if positions else 1
    BM, BF, BC = height(x[0], BM), width(F, x[0]), width(D, x[0])
    tiles = ceil_div(F, BF) * ceil_div(D, BC)
    num_rows = spans.num * K
    segment = max(ceil_div(num_rows, max(1, 256 // (tiles * size * len(x)))), 512)
    segment = ceil_div(segment, BM) * BM
    num_parts = ceil_div(num_rows, segment)
    kept = dtype if num_parts == 1 else torch.float32
    parts = [side.new_empty(num_parts, F, size * D, dtype=kept) for side in x]
    unused = {**both(pe=x, w1=x, sums=x, dout_sums=x, dpe=x), "MEAN": False}
    launch(
        weight_gradients_kernel,
        (tiles, len(x) * size, num_parts + (positions is not None)),
        **both(g=g, x=x, parts=parts),
        **(positions or unused),
        **spans.arguments(),
        SIZE=spans.size,
        segment=segment,
        K=K,
        F=F,
        D=D,
        BLOCK=size,
        BM=BM,
        BF=BF,
        BC=BC,
        BLOCKS=positions is not None,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return [side[0] for side in parts] if num_parts == 1 else sum_parts(parts, dtype)
