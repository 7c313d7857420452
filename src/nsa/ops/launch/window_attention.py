"""Launches sliding-window attention, forward and backward."""

from __future__ import annotations

from torch import Tensor

from nsa.ops.launch.branches import Branch, Geometry
from nsa.ops.launch.gradients import attention_bwd
from nsa.ops.launch.token_attention import token_attention_fwd


def window_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    window_size: int,
    softmax_scale: float,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """``(o, lse)``."""
    out = token_attention_fwd(
        q,
        None,
        (k, v),
        cu_seqlens=cu_seqlens,
        window_size=window_size,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
    )
    return out["o_win"], out["lse_win"]


def window_attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    window_size: int,
    softmax_scale: float,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``."""
    geometry = Geometry(
        window_size=window_size,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
        cu_seqlens=cu_seqlens,
    )
    branch = Branch(k=k, v=v, o=o, lse=lse)
    grads = attention_bwd(do, q, {"win": branch}, None, geometry, dlse)
    return grads["dq"], grads["dk_win"], grads["dv_win"]
