"""Launches compression: the kinds of phi, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.kernels.compress_kv import (
    gated_bwd_kernel,
    gated_fwd_kernel,
    hidden_kernel,
    locate_spans_kernel,
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
    blocks = _Spans.of(x, cu_seqlens, compress_block_size, compress_block_size, compress_stride)
    out = x.new_empty(*blocks.shape, *x.shape[-2:])
    if out.numel() == 0:
        return out
    if kind == "mean":
        _mean(x, blocks, out)
        return out
    assert pe is not None, f"kind {kind!r} needs pe"
    assert w1 is not None, f"kind {kind!r} needs w1"
    if kind == "linear":
        _hidden(x, pe, w1, blocks, out)
    elif kind == "gated":
        _gated_fwd(x, pe, w1, blocks, out)
    else:
        assert kind == "mlp", f"unknown kind {kind!r}"
        assert w2 is not None, "kind 'mlp' needs w2"
        act = x.new_empty(*out.shape[:-1], w1.shape[0])
        _hidden(x, pe, w1, blocks, act, silu=True)
        _mean(x, blocks, out, (pe, act, w2))
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
    blocks = _Spans.of(x, cu_seqlens, size, size, stride)
    pieces = _Spans.of(x, cu_seqlens, stride, size, stride)
    given = [x.new_zeros(0 if like is None else like.shape) for like in (pe, w1, w2)]
    if blocks.num * x[..., 0, :].numel() == 0:
        return torch.zeros_like(x), given[0], given[1], given[2]
    dout = dout.contiguous()
    if cu_seqlens is not None:
        # Whatever came for the slots no sequence fills must not reach a sum.
        dout = torch.where((blocks.table[0] >= 0).view(-1, 1, 1), dout, 0)
    if kind == "mean":
        # Without a product this only moves memory: small tiles keep more of it in flight.
        dx = _token_gradients(x, blocks, pieces, dout=dout, BM=32)
        return dx, given[0], given[1], given[2]
    assert pe is not None, f"kind {kind!r} needs pe"
    assert w1 is not None, f"kind {kind!r} needs w1"
    if kind == "gated":
        return *_gated_bwd(dout, x, pe, w1, blocks, pieces), given[2]
    if kind == "linear":
        dx = _token_gradients(x, blocks, pieces, dhidden=dout, w1=w1)
        return dx, *_position_gradients(dout, x, pe, w1, blocks), given[2]
    assert kind == "mlp", f"unknown kind {kind!r}"
    assert w2 is not None, "kind 'mlp' needs w2"
    act = x.new_empty(*dout.shape[:-1], w1.shape[0])
    dhidden = torch.empty_like(act)
    # Two accumulators instead of one: tiles of half the height keep them in registers.
    _hidden(x, pe, w1, blocks, act, silu=True, gradient=(dout, w2, dhidden), BM=64)
    dx = _token_gradients(x, blocks, pieces, dhidden=dhidden, w1=w1, dout=dout)
    dpe, dw1 = _position_gradients(dhidden, x, pe, w1, blocks, dout)
    return dx, dpe, dw1, _weight_gradients(dout, act, blocks).to(w2.dtype)


@dataclass(frozen=True)
class _Spans:
    """Spans of tokens, one every ``stride``, in the layout of compressed blocks.

    ``table``: see ``nsa.kernels.compress_kv``. ``shape``: leading axes of a tensor with one entry a
    span. ``per_seq``: spans of a sequence of a batch, ``num`` where packed, as if there were one.
    """

    table: Tensor
    shape: tuple[int, ...]
    num: int
    per_seq: int
    block: int
    stride: int

    @classmethod
    def of(
        cls, x: Tensor, cu_seqlens: Tensor | None, size: int, block: int, stride: int, BN=256
    ) -> _Spans:
        """Spans of ``size`` tokens of ``x [B, T, K, D]``, or packed, in blocks of ``block``."""
        seq = x.shape[-3]
        if cu_seqlens is None:
            per_seq = 0 if seq < size else (seq - size) // stride + 1
            shape: tuple[int, ...] = (x.shape[0], per_seq)
        else:
            per_seq = seq // stride
            shape = (per_seq,)
        num = shape[0] * per_seq if cu_seqlens is None else per_seq
        num_seqs = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        table = torch.empty(3, num, dtype=torch.int64, device=x.device)
        if num:
            launch(
                locate_spans_kernel,
                (ceil_div(num, BN),),
                table_ptr=table,
                cu_seqlens_ptr=table if cu_seqlens is None else cu_seqlens,
                num_seqs=num_seqs,
                search_steps=num_seqs.bit_length(),
                num=num,
                T=seq,
                per_seq=per_seq,
                SIZE=size,
                BLOCK=block,
                STRIDE=stride,
                BN=BN,
                PACKED=cu_seqlens is not None,
                num_warps=4,
            )
        return cls(table, shape, num, per_seq, block, stride)


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
    pe: Tensor,
    w1: Tensor,
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
        bias_ptr=pe.float().flatten(1) @ w1.float().mT,
        table_ptr=blocks.table,
        out_ptr=out,
        dout_ptr=dout,
        w2_ptr=w2,
        dhidden_ptr=dhidden,
        num=blocks.num,
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
    """Fills ``out`` with means; ``mlp = (pe, act, w2)`` adds positions and ``W2 act``."""
    K, D = x.shape[-2:]
    pe, act, w2 = mlp or (x, x, x)
    F = act.shape[-1]
    BC = _width(D, x)
    launch(
        mean_kernel,
        (ceil_div(blocks.num * K, BM), ceil_div(D, BC)),
        x_ptr=x,
        pe_mean_ptr=pe.float().mean(1) if mlp else x,
        act_ptr=act,
        w2_ptr=w2,
        table_ptr=blocks.table,
        out_ptr=out,
        num=blocks.num,
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
    dx = torch.zeros_like(x)  # tokens past the last piece of their sequence are in no block
    launch(
        token_gradients_kernel,
        (ceil_div(pieces.num * K, BM), blocks.stride * ceil_div(D, BC)),
        dhidden_ptr=x if dhidden is None else dhidden,
        w1_ptr=x if w1 is None else w1,
        dout_ptr=x if dout is None else dout,
        table_ptr=pieces.table,
        dx_ptr=dx,
        num=pieces.num,
        per_seq=pieces.per_seq,
        gap=pieces.per_seq - blocks.per_seq,
        scale=1.0 / blocks.block,
        K=K,
        D=D,
        F=F,
        BLOCK=blocks.block,
        STRIDE=blocks.stride,
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
    """``dpe`` and ``dw1`` of a product with flattened blocks; ``dout`` through the mean."""
    sums = _sum_blocks(dhidden)  # [K, F]
    dpe = (sums @ w1.float()).view(pe.shape)
    if dout is not None:
        dpe += _sum_blocks(dout).unsqueeze(1) / blocks.block
    dw1 = _weight_gradients(dhidden, x, blocks, of_blocks=True)
    dw1 += sums.mT @ pe.float().flatten(1)
    return dpe.to(pe.dtype), dw1.to(w1.dtype)


def _sum_blocks(x: Tensor) -> Tensor:
    """``[..., K, C] -> [K, C]``, fp32."""
    return x.flatten(0, -3).sum(0, dtype=torch.float32)


def _weight_gradients(
    g: Tensor,
    x: Tensor,
    spans: _Spans,
    *,
    of_blocks: bool = False,
    BM=64,
    num_warps=8,
    num_stages=3,
) -> Tensor:
    """``sum g^T x`` over rows, fp32 ``[F, C]``; ``of_blocks``: x are the flattened blocks.

    Enough parts to fill the device, none below a few hundred rows: memory does not grow with the
    length.
    """
    K, D = x.shape[-2:]
    F = g.shape[-1]
    size = spans.block if of_blocks else 1
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
        table_ptr=spans.table,
        parts_ptr=parts,
        num=spans.num,
        segment=segment,
        K=K,
        F=F,
        D=D,
        BLOCK=size,
        BM=BM,
        BF=BF,
        BC=BC,
        BLOCKS=of_blocks,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return parts.sum(0)


def _gated_bias(pe: Tensor, w1: Tensor) -> Tensor:
    return pe.float() @ w1.float().mT


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
        bias_ptr=_gated_bias(pe, w1),
        table_ptr=blocks.table,
        out_ptr=out,
        lse_ptr=out if lse is None else lse,
        num=blocks.num,
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
        bias_ptr=_gated_bias(pe, w1),
        dout_ptr=dout,
        out_ptr=out,
        lse_ptr=lse,
        table_ptr=pieces.table,
        direct_ptr=direct,
        dlogits_ptr=dlogits,
        parts_ptr=parts,
        num=pieces.num,
        per_seq=pieces.per_seq,
        gap=pieces.per_seq - blocks.per_seq,
        K=K,
        D=D,
        DP=padded_dim(D),
        BLOCK=blocks.block,
        STRIDE=blocks.stride,
        BM=BM,
        BC=BC,
        num_warps=num_warps,
    )
    direct_sum, dlogits_sum = parts.sum(0)
    dpe = direct_sum + dlogits_sum @ w1.float()
    # The logits are a product with each token, a block of one.
    tokens = _Spans.of(x.view(1, -1, K, D), None, 1, 1, 1)
    dw1 = _weight_gradients(dlogits, x, tokens)
    dw1 += dlogits_sum.flatten(0, 1).mT @ pe.float().flatten(0, 1)
    dx = _token_gradients(x, tokens, tokens, dhidden=dlogits, w1=w1, dout=direct)
    return dx, dpe.to(pe.dtype), dw1.to(w1.dtype)
