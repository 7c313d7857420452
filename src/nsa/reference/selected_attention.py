"""Attention to the selected blocks (eq. 11-12): a query sees their tokens up to its own."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.reference.masked_attention import KeysOf, masked_attention_bwd, masked_attention_fwd
from nsa.reference.packed import TOKENS, map_sequences


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
    """See ``nsa.ops.selected_attention``; returns ``(o, lse)``."""

    def batched(q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor) -> tuple[Tensor, Tensor]:
        keys_of = selected_keys(k, block_indices, q_offset, block_size=block_size)
        return masked_attention_fwd(q, k, v, keys_of=keys_of, softmax_scale=softmax_scale)

    if cu_seqlens is None:
        return batched(q, k, v, block_indices)
    rows = [(x, TOKENS) for x in (q, k, v, block_indices)]
    o, lse = map_sequences(
        batched,
        rows,
        [TOKENS, TOKENS],
        cu_seqlens=cu_seqlens,
        compress_block_size=1,
        compress_stride=1,
    )
    return o, lse


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
    """Gradients of q, k and v. The choice of blocks has none."""

    def batched(
        do: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_indices: Tensor,
        o: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys_of = selected_keys(k, block_indices, q_offset, block_size=block_size)
        return masked_attention_bwd(
            do, dlse, q, k, v, o, lse, keys_of=keys_of, softmax_scale=softmax_scale
        )

    if cu_seqlens is None:
        return batched(do, dlse, q, k, v, block_indices, o, lse)
    rows = [(x, TOKENS) for x in (do, dlse, q, k, v, block_indices, o, lse)]
    dq, dk, dv = map_sequences(
        batched, rows, [TOKENS] * 3, cu_seqlens=cu_seqlens, compress_block_size=1, compress_stride=1
    )
    return dq, dk, dv


def selected_keys(k: Tensor, block_indices: Tensor, q_offset: int, *, block_size: int) -> KeysOf:
    """Visibility: ``s <= t`` and ``s // l'`` is one of the query's blocks."""

    def keys_of(start: int, stop: int) -> tuple[int, int, Tensor]:
        hi = min(k.shape[1], q_offset + stop)
        num_blocks = -(-hi // block_size)
        chosen = block_indices[:, start:stop].long()
        # Unused slots (-1) are sent to a column past the last block, which is then dropped.
        columns = torch.where(chosen < 0, num_blocks, chosen).clamp_(max=num_blocks)
        member = torch.zeros(*chosen.shape[:3], num_blocks + 1, dtype=torch.bool, device=k.device)
        member.scatter_(-1, columns, True)
        in_block = member[..., :num_blocks].repeat_interleave(block_size, dim=-1)[..., :hi]
        positions = torch.arange(q_offset + start, q_offset + stop, device=k.device)[:, None]
        return 0, hi, in_block & (torch.arange(hi, device=k.device) <= positions)[None, :, None]

    return keys_of
