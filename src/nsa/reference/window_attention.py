"""Sliding-window attention: a query sees exactly ``w`` keys, its own included."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.reference.masked_attention import KeysOf, masked_attention_bwd, masked_attention_fwd
from nsa.reference.packed import TOKENS, map_sequences


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
    """See ``nsa.ops.window_attention``; returns ``(o, lse)``."""

    def batched(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys_of = window_keys(k, q_offset, window_size=window_size)
        return masked_attention_fwd(q, k, v, keys_of=keys_of, softmax_scale=softmax_scale)

    if cu_seqlens is None:
        return batched(q, k, v)
    rows = [(q, TOKENS), (k, TOKENS), (v, TOKENS)]
    o, lse = map_sequences(
        batched,
        rows,
        [TOKENS, TOKENS],
        cu_seqlens=cu_seqlens,
        compress_block_size=1,
        compress_stride=1,
    )
    return o, lse


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
    """Gradients of q, k and v."""

    def batched(
        do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
    ):
        keys_of = window_keys(k, q_offset, window_size=window_size)
        return masked_attention_bwd(
            do, dlse, q, k, v, o, lse, keys_of=keys_of, softmax_scale=softmax_scale
        )

    if cu_seqlens is None:
        return batched(do, dlse, q, k, v, o, lse)
    rows = [(x, TOKENS) for x in (do, dlse, q, k, v, o, lse)]
    dq, dk, dv = map_sequences(
        batched, rows, [TOKENS] * 3, cu_seqlens=cu_seqlens, compress_block_size=1, compress_stride=1
    )
    return dq, dk, dv


def window_keys(k: Tensor, q_offset: int, *, window_size: int) -> KeysOf:
    """Visibility ``t - w < s <= t``."""

    def keys_of(start: int, stop: int) -> tuple[int, int, Tensor]:
        lo = max(0, q_offset + start - window_size + 1)
        hi = min(k.shape[1], q_offset + stop)
        positions = torch.arange(q_offset + start, q_offset + stop, device=k.device)[:, None]
        keys = torch.arange(lo, hi, device=k.device)
        return lo, hi, ((keys <= positions) & (keys > positions - window_size))[None, :, None]

    return keys_of
