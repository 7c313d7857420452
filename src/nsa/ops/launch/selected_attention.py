"""Launches attention to selected blocks, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.ops.launch.branches import Branch, Geometry
from nsa.ops.launch.gradients import attention_bwd
from nsa.ops.launch.tiles import ceil_div
from nsa.ops.launch.token_attention import token_attention_fwd


def selected_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    block_size: int,
    softmax_scale: float,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """``(o, lse)``."""
    out = token_attention_fwd(
        q,
        (k, v, _distinct(block_indices, k, block_size)),
        None,
        cu_seqlens=cu_seqlens,
        block_size=block_size,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
    )
    return out["o_slc"], out["lse_slc"]


def selected_attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    block_size: int,
    softmax_scale: float,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``."""
    geometry = Geometry(
        block_size=block_size,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
        cu_seqlens=cu_seqlens,
    )
    chosen = _distinct(block_indices, k, block_size)
    branch = Branch(k=k, v=v, o=o, lse=lse, block_indices=chosen)
    grads = attention_bwd(do, q, {"slc": branch}, None, geometry, dlse)
    return grads["dq"], grads["dk_slc"], grads["dv_slc"]


def _distinct(block_indices: Tensor, k: Tensor, block_size: int) -> Tensor:
    """The same choice as lists count on it: each block once, none that holds no key."""
    ordered = torch.sort(block_indices, dim=-1).values
    unused = ordered >= ceil_div(k.shape[-3], block_size)
    unused[..., 1:] |= ordered[..., 1:] == ordered[..., :-1]
    return ordered.masked_fill_(unused, -1)
