"""Attention to compressed blocks (eq. 7): a query sees the blocks that end at or before it."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.reference.masked_attention import KeysOf, masked_attention_bwd, masked_attention_fwd
from nsa.reference.packed import SLOTS, TOKENS, map_sequences


def compressed_attention_fwd(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    compress_block_size: int,
    compress_stride: int,
    softmax_scale: float,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """See ``nsa.ops.compressed_attention``; returns ``(o, lse)``."""
    geometry = {"compress_block_size": compress_block_size, "compress_stride": compress_stride}

    def batched(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys_of = compressed_keys(k, q_offset, **geometry)
        return masked_attention_fwd(q, k, v, keys_of=keys_of, softmax_scale=softmax_scale)

    if cu_seqlens is None:
        return batched(q, k_cmp, v_cmp)
    o, lse = map_sequences(
        batched,
        [(q, TOKENS), (k_cmp, SLOTS), (v_cmp, SLOTS)],
        [TOKENS, TOKENS],
        cu_seqlens=cu_seqlens,
        **geometry,
    )
    return o, lse


def compressed_attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    compress_block_size: int,
    compress_stride: int,
    softmax_scale: float,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k_cmp and v_cmp."""
    geometry = {"compress_block_size": compress_block_size, "compress_stride": compress_stride}

    def batched(
        do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
    ):
        keys_of = compressed_keys(k, q_offset, **geometry)
        return masked_attention_bwd(
            do, dlse, q, k, v, o, lse, keys_of=keys_of, softmax_scale=softmax_scale
        )

    if cu_seqlens is None:
        return batched(do, dlse, q, k_cmp, v_cmp, o, lse)
    rows = [
        (do, TOKENS),
        (dlse, TOKENS),
        (q, TOKENS),
        (k_cmp, SLOTS),
        (v_cmp, SLOTS),
        (o, TOKENS),
        (lse, TOKENS),
    ]
    dq, dk, dv = map_sequences(
        batched, rows, [TOKENS, SLOTS, SLOTS], cu_seqlens=cu_seqlens, **geometry
    )
    return dq, dk, dv


def compressed_keys(
    k_cmp: Tensor, q_offset: int, *, compress_block_size: int, compress_stride: int
) -> KeysOf:
    """Visibility ``i * d + l - 1 <= t`` of compressed blocks."""

    def keys_of(start: int, stop: int) -> tuple[int, int, Tensor]:
        last = q_offset + stop - 1
        hi = min(k_cmp.shape[1], max(0, (last + 1 - compress_block_size) // compress_stride + 1))
        positions = torch.arange(q_offset + start, q_offset + stop, device=k_cmp.device)
        block_ends = (
            torch.arange(hi, device=k_cmp.device) * compress_stride + compress_block_size - 1
        )
        return 0, hi, (block_ends <= positions[:, None])[None, :, None]

    return keys_of
