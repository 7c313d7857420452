"""Launches compression: the kinds of phi, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nsa.kernels.compress_kv import (
    gated_bwd_kernel,
    gated_fwd_kernel,
    hidden_kernel,
    locate_slots_kernel,
    mean_kernel,
    token_gradients_kernel,
    weight_gradients_kernel,
)
from nsa.ops.launch.tiles import ceil_div, launch, padded_dim


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
    """Compressed blocks of ``x``; like ``nsa.reference.compress_fwd``."""
    x, pe, w1, w2 = _contiguous(x, pe, w1, w2)
    table = _slots(x, cu_seqlens, compress_stride)
    blocks = _Spans.of(x, table, compress_block_size, compress_block_size, compress_stride)
    out = x.new_empty(*blocks.shape, *x.shape[-2:])
    if out.numel() == 0:
        return out
    if kind == "mean":
        _mean(x, blocks, out)
        return out
    assert pe is not None, f"kind {kind!r} needs pe"
    assert w1 is not None, f"kind {kind!r} needs w1"
    if kind == "linear":
        _hidden(x, w1, _bias(pe.flatten(1), w1), blocks, out)
    elif kind == "gated":
        _gated_fwd(x, pe, w1, blocks, out)
    else:
        assert kind == "mlp", f"unknown kind {kind!r}"
        assert w2 is not None, "kind 'mlp' needs w2"
        act = x.new_empty(*out.shape[:-1], w1.shape[0])
        _hidden(x, w1, _bias(pe.flatten(1), w1), blocks, act, silu=True)
        _mean(x, blocks, out, (pe.mean(1, dtype=torch.float32), act, w2))
    return out


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
    x, pe, w1, w2 = _contiguous(x, pe, w1, w2)
    size, stride = compress_block_size, compress_stride
    table = _slots(x, cu_seqlens, stride)
    blocks = _Spans.of(x, table, size, size, stride)
    pieces = _Spans.of(x, table, stride, size, stride)
    if blocks.num * x[..., 0, :].numel() == 0:
        dx, dpe, dw1, dw2 = (
            _none(x) if w is None else torch.zeros_like(w) for w in (x, pe, w1, w2)
        )
        return dx, dpe, dw1, dw2
    dout = dout.contiguous()
    if cu_seqlens is not None:
        # Whatever came for the slots no sequence fills must not reach a sum.
        dout = torch.where((table[2] >= size).view(-1, 1, 1), dout, 0)
    if kind == "mean":
        # Without a product this only moves memory: small tiles keep more of it in flight.
        dx = _token_gradients(x, blocks, pieces, dout=dout, BM=32)
        return dx, _none(x), _none(x), _none(x)
    assert pe is not None, f"kind {kind!r} needs pe"
    assert w1 is not None, f"kind {kind!r} needs w1"
    if kind == "gated":
        return *_gated_bwd(dout, x, pe, w1, blocks, pieces), _none(x)
    exact = w1.float()
    if kind == "linear":
        dx = _token_gradients(x, blocks, pieces, dhidden=dout, w1=w1)
        return dx, *_position_gradients(dout, x, pe, exact, blocks), _none(x)
    assert kind == "mlp", f"unknown kind {kind!r}"
    assert w2 is not None, "kind 'mlp' needs w2"
    act, dhidden = x.new_empty(2, *dout.shape[:-1], w1.shape[0])
    bias = _bias(pe.flatten(1), exact)
    # Two accumulators instead of one: tiles of half the height keep them in registers.
    _hidden(x, w1, bias, blocks, act, silu=True, gradient=(dout, w2, dhidden), BM=64)
    dx = _token_gradients(x, blocks, pieces, dhidden=dhidden, w1=w1, dout=dout)
    dpe, dw1 = _position_gradients(dhidden, x, pe, exact, blocks, dout)
    # A plain product, which the host starts faster than a kernel and the sum of its parts.
    return dx, dpe, dw1, dout.flatten(0, -2).mT @ act.flatten(0, -2)


def _none(x: Tensor) -> Tensor:
    """What stands for the gradient of an input that is None."""
    return x.new_empty(0)


@dataclass(frozen=True)
class _Spans:
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
    def of(cls, x: Tensor, table: Tensor, size: int, block: int, stride: int) -> _Spans:
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


def _slots(x: Tensor, cu_seqlens: Tensor | None, stride: int, BN=256) -> Tensor:
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
        cu_seqlens_ptr=cu_seqlens,
        num_seqs=num_seqs,
        search_steps=num_seqs.bit_length(),
        num=num,
        STRIDE=stride,
        BN=BN,
    )
    return table


def _bias(pe: Tensor, w1: Tensor) -> Tensor:
    """What positions add to a product with W1, fp32."""
    return pe.float() @ w1.float().mT


def _contiguous(x: Tensor, *weights: Tensor | None) -> list:
    return [x.contiguous(), *(None if w is None else w.contiguous() for w in weights)]


def _width(n: int, x: Tensor) -> int:
    """Columns of a tile that cover ``n`` with little waste.

    Exact float32 products run outside the tensor cores and hold their operands in registers: their
    tiles stay small.
    """
    if x.dtype == torch.float32:
        return 32 if n > 16 else 16
    if n <= 64:
        return padded_dim(n)
    return 128 if ceil_div(n, 64) % 2 == 0 else 64


def _step(n: int, x: Tensor) -> int:
    """Terms of one step of a product over ``n``."""
    if x.dtype == torch.float32:
        return 16
    return next(step for step in (64, 32, 16) if n % step == 0 or step == 16)


def _height(x: Tensor, rows: int) -> int:
    """Rows of a tile, ``rows`` unless the products are exact float32 ones."""
    return 32 if x.dtype == torch.float32 else rows


def _hidden(
    x: Tensor,
    w1: Tensor,
    bias: Tensor,
    blocks: _Spans,
    out: Tensor,
    *,
    silu: bool = False,
    gradient: tuple[Tensor, Tensor, Tensor] | None = None,
    BM=128,
    num_warps=8,
    num_stages=3,
) -> None:
    """Fills ``out [..., K, F]``; with ``gradient = (dout, w2, dhidden)`` also dhidden."""
    K, D = x.shape[-2:]
    F = w1.shape[0]
    BM, BF = _height(x, BM), _width(F, x)
    dout, w2, dhidden = gradient or (out, w1, out)
    launch(
        hidden_kernel,
        (ceil_div(blocks.num * K, BM), ceil_div(F, BF)),
        x_ptr=x,
        w1_ptr=w1,
        bias_ptr=bias,
        **blocks.arguments(),
        out_ptr=out,
        dout_ptr=dout,
        w2_ptr=w2,
        dhidden_ptr=dhidden,
        K=K,
        D=D,
        F=F,
        BLOCK=blocks.block,
        BM=BM,
        BF=BF,
        BK=_step(D, x),
        SILU=silu,
        GRAD=gradient is not None,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _mean(
    x: Tensor,
    blocks: _Spans,
    out: Tensor,
    mlp: tuple[Tensor, Tensor, Tensor] | None = None,
    BM=16,
    num_warps=4,
) -> None:
    """Fills ``out`` with means; ``mlp = (pe_mean, act, w2)`` adds positions and ``W2 act``."""
    K, D = x.shape[-2:]
    pe_mean, act, w2 = mlp or (x, x, x)
    F = act.shape[-1]
    BC = _width(D, x)
    launch(
        mean_kernel,
        (ceil_div(blocks.num * K, BM), ceil_div(D, BC)),
        x_ptr=x,
        pe_mean_ptr=pe_mean,
        act_ptr=act,
        w2_ptr=w2,
        **blocks.arguments(),
        out_ptr=out,
        K=K,
        D=D,
        F=F,
        BLOCK=blocks.block,
        BM=BM,
        BC=BC,
        BK=_step(F, x),
        MLP=mlp is not None,
        num_warps=num_warps,
    )


def _token_gradients(
    x: Tensor,
    blocks: _Spans,
    pieces: _Spans,
    *,
    dhidden: Tensor | None = None,
    w1: Tensor | None = None,
    dout: Tensor | None = None,
    BM=128,
    num_warps=8,
    num_stages=3,
) -> Tensor:
    """``dx``: through the hidden units (``dhidden`` and ``w1``), the mean (``dout``) or both."""
    K, D = x.shape[-2:]
    F = 1 if w1 is None else w1.shape[0]
    BM, BC = _height(x, BM), _width(D, x)
    # Tokens past the last piece of their sequence are in no block.
    full = not pieces.packed and pieces.seq % pieces.stride == 0
    dx = torch.empty_like(x) if full else torch.zeros_like(x)
    launch(
        token_gradients_kernel,
        (ceil_div(pieces.num * K, BM), blocks.stride * ceil_div(D, BC)),
        dhidden_ptr=x if dhidden is None else dhidden,
        w1_ptr=x if w1 is None else w1,
        dout_ptr=x if dout is None else dout,
        **pieces.arguments(),
        dx_ptr=dx,
        gap=pieces.per_seq - blocks.per_seq,
        scale=1.0 / blocks.block,
        K=K,
        D=D,
        F=F,
        BLOCK=blocks.block,
        BM=BM,
        BC=BC,
        BK=_step(F, x),
        HIDDEN=dhidden is not None,
        MEAN=dout is not None,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return dx


def _position_gradients(
    dhidden: Tensor,
    x: Tensor,
    pe: Tensor,
    w1: Tensor,
    blocks: _Spans,
    dout: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``dpe`` and ``dw1`` of a product with flattened blocks; ``dout`` through the mean.

    ``w1`` in fp32.
    """
    sums = _sum_blocks(dhidden)  # [K, F]
    dpe = (sums @ w1).view(pe.shape)
    if dout is not None:
        dpe = dpe.add_(_sum_blocks(dout).unsqueeze(1), alpha=1 / blocks.block)
    return dpe.to(pe.dtype), _weight_gradients(dhidden, x, blocks, (sums, pe))


def _sum_blocks(x: Tensor) -> Tensor:
    """``[..., K, C] -> [K, C]``, fp32."""
    return x.sum(tuple(range(x.dim() - 2)), dtype=torch.float32)


def _weight_gradients(
    g: Tensor,
    x: Tensor,
    spans: _Spans,
    positions: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    BM=64,
    num_warps=8,
    num_stages=3,
) -> Tensor:
    """``sum g^T x [F, C]`` over rows, in ``dtype`` or that of ``x``.

    With ``positions = (sums of g, pe)``, ``x`` are the flattened blocks with positions.

    Enough parts to fill the device, none below a few hundred rows: memory does not grow with the
    length.
    """
    K, D = x.shape[-2:]
    F = g.shape[-1]
    size = spans.block if positions else 1
    sums, pe = positions or (x, x)
    BM, BF, BC = _height(x, BM), _width(F, x), _width(D, x)
    tiles = ceil_div(F, BF) * ceil_div(D, BC)
    num_rows = spans.num * K
    segment = max(ceil_div(num_rows, max(1, 256 // (tiles * size))), 256)
    segment = ceil_div(segment, BM) * BM
    num_parts = ceil_div(num_rows, segment)
    parts = torch.empty(num_parts, F, size * D, dtype=torch.float32, device=x.device)
    launch(
        weight_gradients_kernel,
        (tiles, size, num_parts),
        g_ptr=g,
        x_ptr=x,
        sums_ptr=sums,
        pe_ptr=pe,
        **spans.arguments(),
        SIZE=spans.size,
        parts_ptr=parts,
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
    return (parts[0] if num_parts == 1 else parts.sum(0)).to(dtype or x.dtype)


def _gated_fwd(
    x: Tensor,
    pe: Tensor,
    w1: Tensor,
    blocks: _Spans,
    out: Tensor,
    lse: Tensor | None = None,
    BM=64,
    num_warps=8,
    num_stages=2,
) -> None:
    """Fills ``out``, and ``lse`` if given."""
    K, D = x.shape[-2:]
    BM, BC = _height(x, BM), min(64, _width(D, x))
    launch(
        gated_fwd_kernel,
        (ceil_div(blocks.num, BM), K, ceil_div(D, BC)),
        x_ptr=x,
        pe_ptr=pe,
        w1_ptr=w1,
        bias_ptr=_bias(pe, w1),
        **blocks.arguments(),
        out_ptr=out,
        lse_ptr=out if lse is None else lse,
        K=K,
        D=D,
        DP=padded_dim(D),
        BLOCK=blocks.block,
        BM=BM,
        BC=BC,
        SAVE=lse is not None,
        num_warps=4 if x.dtype == torch.float32 else num_warps,
        num_stages=num_stages,
    )


def _gated_bwd(
    dout: Tensor,
    x: Tensor,
    pe: Tensor,
    w1: Tensor,
    blocks: _Spans,
    pieces: _Spans,
    BM=64,
    num_warps=8,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dpe, dw1)``."""
    K, D = x.shape[-2:]
    out = torch.empty(dout.shape, dtype=torch.float32, device=x.device)
    lse = torch.empty_like(out)
    _gated_fwd(x, pe, w1, blocks, out, lse)
    BM, BC = _height(x, BM), min(64, _width(D, x))
    direct = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    dlogits = torch.zeros_like(x)
    num_tiles = ceil_div(pieces.num, BM)
    parts = torch.empty(num_tiles, 2, *pe.shape, dtype=torch.float32, device=x.device)
    launch(
        gated_bwd_kernel,
        (num_tiles, K, blocks.stride * ceil_div(D, BC)),
        x_ptr=x,
        pe_ptr=pe,
        w1_ptr=w1,
        bias_ptr=_bias(pe, w1),
        dout_ptr=dout,
        out_ptr=out,
        lse_ptr=lse,
        **pieces.arguments(),
        direct_ptr=direct,
        dlogits_ptr=dlogits,
        parts_ptr=parts,
        gap=pieces.per_seq - blocks.per_seq,
        K=K,
        D=D,
        DP=padded_dim(D),
        BLOCK=blocks.block,
        BM=BM,
        BC=BC,
        num_warps=num_warps,
    )
    direct_sum, dlogits_sum = parts.sum(0)
    dpe = direct_sum + dlogits_sum @ w1.float()
    # The logits are a product with each token, a block of one.
    tokens = _Spans.of(x.view(1, -1, K, D), x, 1, 1, 1)
    dw1 = _weight_gradients(dlogits, x, tokens, dtype=torch.float32)
    dw1 += dlogits_sum.flatten(0, 1).mT @ pe.float().flatten(0, 1)
    dx = _token_gradients(x, tokens, tokens, dhidden=dlogits, w1=w1, dout=direct)
    return dx, dpe.to(pe.dtype), dw1.to(w1.dtype)
