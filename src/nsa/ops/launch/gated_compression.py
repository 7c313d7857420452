"""Launches the gated kind of phi, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.kernels.gated_compression import gated_bwd_kernel, gated_fwd_kernel
from nsa.ops.launch.block_products import (
    Spans,
    height,
    token_gradients,
    weight_gradients,
    width,
)
from nsa.ops.launch.tiles import ceil_div, launch, padded_dim


def gated_fwd(
    x: Tensor,
    pe: Tensor,
    w1: Tensor,
    blocks: Spans,
    out: Tensor,
    lse: Tensor | None = None,
    BM=64,
    num_warps=8,
    num_stages=2,
) -> None:
    """Fills ``out``, and ``lse`` if given."""
    K, D = x.shape[-2:]
    BM, BC = height(x, BM), min(64, width(D, x))
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


def gated_bwd(
    dout: Tensor,
    x: Tensor,
    pe: Tensor,
    w1: Tensor,
    blocks: Spans,
    pieces: Spans,
    BM=64,
    num_warps=8,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dpe, dw1)``."""
    K, D = x.shape[-2:]
    out = torch.empty(dout.shape, dtype=torch.float32, device=x.device)
    lse = torch.empty_like(out)
    gated_fwd(x, pe, w1, blocks, out, lse)
    BM, BC = height(x, BM), min(64, width(D, x))
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
    tokens = Spans.of(x.view(1, -1, K, D), x, 1, 1, 1)
    (dw1,) = weight_gradients([dlogits], [x], tokens, dtype=torch.float32)
    dw1 += dlogits_sum.flatten(0, 1).mT @ pe.float().flatten(0, 1)
    (dx,) = token_gradients([x], tokens, tokens, dhidden=[dlogits], w1=[w1], dout=[direct])
    return dx, dpe.to(pe.dtype), dw1.to(w1.dtype)


def _bias(pe: Tensor, w1: Tensor) -> Tensor:
    """What positions add to a product with W1, fp32."""
    return pe.float() @ w1.float().mT
