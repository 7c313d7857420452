"""The choice of blocks: from the probabilities of compressed attention to block indices (eq. 8-11).

The printed eq. 9 uses 1-based indices. In 0-based ones selection block ``j`` collects the
compressed blocks ``(l'/d) j + m - r``, which are exactly those that overlap it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.reference.compressed_attention import compressed_keys
from nsa.reference.masked_attention import masked_logits, probabilities, query_chunks
from nsa.reference.packed import SLOTS, TOKENS, map_sequences


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    config: NSAConfig,
    softmax_scale: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    q_offset: int = 0,
) -> Tensor:
    """See ``nsa.ops.select_blocks``; returns int32 ``block_indices``.

    ``max_seqlen`` changes nothing here.
    """

    def batched(q: Tensor, k_cmp: Tensor, lse: Tensor) -> tuple[Tensor]:
        num_kv_heads = k_cmp.shape[2]
        chosen = torch.full(
            (*q.shape[:2], num_kv_heads, config.num_selected_blocks),
            -1,
            dtype=torch.int32,
            device=q.device,
        )
        for start, stop in query_chunks(
            q.shape[1], q.shape[0] * q.shape[2] * max(1, k_cmp.shape[1]), q.device
        ):
            scores = block_scores(q, k_cmp, lse, start, stop, config, softmax_scale, q_offset)
            chosen[:, start:stop] = top_blocks(scores, q_offset + start, config)
        return (chosen,)

    if cu_seqlens is None:
        return batched(q, k_cmp, lse)[0]
    return map_sequences(
        batched,
        [(q, TOKENS), (k_cmp, SLOTS), (lse, TOKENS)],
        [TOKENS],
        cu_seqlens=cu_seqlens,
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
    )[0]


def block_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    start: int,
    stop: int,
    config: NSAConfig,
    softmax_scale: float,
    q_offset: int = 0,
) -> Tensor:
    """Importance ``p_slc'`` of every block for the queries ``start .. stop - 1`` (eq. 8-10).

    Returns ``[B, C, K, blocks]``; ``blocks`` covers the positions up to the last of these queries.
    """
    batch, num_kv_heads = q.shape[0], k_cmp.shape[2]
    num_blocks = config.num_blocks(q_offset + stop)
    keys_of = compressed_keys(
        k_cmp,
        q_offset,
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
    )
    _, hi, visible = keys_of(start, stop)
    if hi == 0:
        return torch.zeros(
            batch, stop - start, num_kv_heads, num_blocks, dtype=lse.dtype, device=q.device
        )
    logits = masked_logits(
        q[:, start:stop], k_cmp[:, :hi], visible, softmax_scale
    )  # [B, K, C, G, S]
    row_lse = lse[:, start:stop].unflatten(2, (num_kv_heads, -1)).transpose(1, 2)
    per_compressed = (
        probabilities(logits, row_lse).sum(3).transpose(1, 2)
    )  # [B, C, K, S], heads summed (eq. 10)
    per_block = config.block_size // config.compress_stride
    before = config.compress_block_size // config.compress_stride - 1
    weights = config.importance_weights()
    # A selection block reads `len(weights)` compressed blocks; the next starts `per_block` later.
    padding = (before, max(0, (num_blocks - 1) * per_block + len(weights) - before - hi))
    windows = torch.nn.functional.pad(per_compressed, padding).unfold(-1, len(weights), per_block)
    scores = torch.zeros_like(windows[..., :num_blocks, 0])
    # Term by term, not a matrix product: every block sums in the same order, so ties stay exact.
    for i, weight in enumerate(weights):
        scores += weight * windows[..., :num_blocks, i]
    return scores


def top_blocks(scores: Tensor, first_position: int, config: NSAConfig) -> Tensor:
    """The ``n`` best blocks, forced ones first in line, ties to the lower: ascending, -1 last."""
    num_queries, num_blocks = scores.shape[1], scores.shape[-1]
    positions = torch.arange(first_position, first_position + num_queries, device=scores.device)[
        :, None
    ]
    own_block = positions // config.block_size
    blocks = torch.arange(num_blocks, device=scores.device)
    forced = (blocks < config.num_init_blocks) | (blocks > own_block - config.num_local_blocks)
    future = blocks > own_block
    scores = scores.masked_fill(forced[None, :, None], torch.inf).masked_fill(
        future[None, :, None], -torch.inf
    )
    ranked = torch.sort(scores, dim=-1, descending=True, stable=True)
    count = min(config.num_selected_blocks, num_blocks)
    best, best_scores = ranked.indices[..., :count], ranked.values[..., :count]
    best = torch.sort(best.masked_fill(best_scores == -torch.inf, num_blocks), dim=-1).values
    best = best.masked_fill(best == num_blocks, -1)
    return torch.nn.functional.pad(best, (0, config.num_selected_blocks - count), value=-1).to(
        torch.int32
    )
