"""One layer's looking, measured: from the tensors of the branches to plain arrays.

The measurements follow the reference arithmetic and walk over chunks of queries, so memory grows
linearly with the text. They are for looking, not for training: one sequence, no gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops import compressed_attention, select_blocks
from nsa.reference.compressed_attention import compressed_keys
from nsa.reference.masked_attention import masked_logits, probabilities, query_chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTrace:
    """What one layer looked at, for T queries, K kv heads of G query heads each, H = K G.

    Every fraction lies in [0, 1]. "Dense attention" is the softmax over all tokens up to the query
    of the layer's own queries and selection keys, averaged over the G heads of a kv head.

    Args:
        block_indices: int32 ``[T, K, n]``, the blocks each query read (eq. 11), -1 for unused.
        gates: float32 ``[T, H, 3]`` in the order cmp, slc, win (eq. 5).
        compressed: float16 ``[T, K, T_c]``, attention to the compressed blocks (eq. 8), averaged
            over the G heads. Rows sum to 1, or to 0 before the first whole block.
        overlap: float32 ``[T, K]``, share of a query's blocks that the query before it read too;
            NaN for the first query.
        recall: float32 ``[T, K]``, share of the dense attention that falls on tokens of the
            selected blocks or of the window.
        window_recall: float32 ``[T, K]``, the same for the window alone.
        best_recall: float32 ``[T, K]``, the same for the best choice of n blocks (the forced ones
            included) that knows the dense attention.
        twin_recall: float32 ``[T, K]``, share of a dense twin's attention in the same layer that
            falls on these selected blocks and window; None without a twin.
    """

    block_indices: np.ndarray
    gates: np.ndarray
    compressed: np.ndarray
    overlap: np.ndarray
    recall: np.ndarray
    window_recall: np.ndarray
    best_recall: np.ndarray
    twin_recall: np.ndarray | None = None


@torch.no_grad()
def measure_layer(
    q: Tensor,
    k_cmp: Tensor,
    k_slc: Tensor,
    gates: Tensor,
    *,
    config: NSAConfig,
    softmax_scale: float,
    twin: tuple[Tensor, Tensor, float] | None = None,
) -> LayerTrace:
    """Measures one layer from what its branches were given.

    Args:
        q: rotated queries ``[1, T, H, Dk]``.
        k_cmp: compressed, rotated keys ``[1, T_c, K, Dk]``.
        k_slc: rotated keys of the selection branch ``[1, T, K, Dk]``.
        gates: ``[1, T, H, 3]``.
        config: block sizes and counts.
        softmax_scale: factor of the logits.
        twin: rotated queries, rotated keys and softmax scale of the same layer of a dense model.

    Returns:
        The layer's trace, on the CPU.
    """
    _, lse = compressed_attention(
        q,
        k_cmp,
        k_cmp,
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        softmax_scale=softmax_scale,
    )
    chosen = select_blocks(q, k_cmp, lse, config=config, softmax_scale=softmax_scale)
    num_tokens, num_kv_heads = q.shape[1], k_slc.shape[2]
    recall, window_recall, best_recall, twin_recall = torch.zeros(
        4, num_tokens, num_kv_heads, device=q.device
    ).unbind()
    for start, stop in query_chunks(num_tokens, q.shape[2] * num_tokens, q.device):
        rows = slice(start, stop)
        mass = dense_mass(q, k_slc, start, stop, softmax_scale)
        window = in_window(start, stop, config, q.device)[:, None].expand_as(mass)
        read = window | in_blocks(chosen[0, rows], stop, config)
        window_recall[rows] = (mass * window).sum(-1)
        recall[rows] = (mass * read).sum(-1)
        best_recall[rows] = window_recall[rows] + best_blocks(mass * ~window, start, config)
        if twin is not None:
            twin_recall[rows] = (dense_mass(twin[0], twin[1], start, stop, twin[2]) * read).sum(-1)
    return LayerTrace(
        block_indices=_array(chosen[0]),
        gates=_array(gates[0].float()),
        compressed=_array(compressed_probabilities(q, k_cmp, lse, config, softmax_scale)),
        overlap=_array(neighbour_overlap(chosen[0])),
        recall=_array(recall),
        window_recall=_array(window_recall),
        best_recall=_array(best_recall),
        twin_recall=None if twin is None else _array(twin_recall),
    )


def compressed_probabilities(
    q: Tensor, k_cmp: Tensor, lse: Tensor, config: NSAConfig, softmax_scale: float
) -> Tensor:
    """Attention to compressed blocks, mean over each kv head's queries: float16 ``[T, K, T_c]``."""
    num_blocks, num_kv_heads = k_cmp.shape[1:3]
    out = torch.zeros(q.shape[1], num_kv_heads, num_blocks, dtype=torch.float16, device=q.device)
    keys_of = compressed_keys(
        k_cmp,
        0,
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
    )
    for start, stop in query_chunks(q.shape[1], q.shape[2] * max(1, num_blocks), q.device):
        _, hi, visible = keys_of(start, stop)
        logits = masked_logits(q[:, start:stop], k_cmp[:, :hi], visible, softmax_scale)
        row_lse = lse[:, start:stop].unflatten(2, (num_kv_heads, -1)).transpose(1, 2)
        out[start:stop, :, :hi] = probabilities(logits, row_lse)[0].mean(2).transpose(0, 1)
    return out


def dense_mass(q: Tensor, k: Tensor, start: int, stop: int, softmax_scale: float) -> Tensor:
    """Dense causal attention of the queries ``start .. stop - 1``: ``[C, K, stop]``, head mean."""
    causal = in_past(start, stop, q.device)[None, :, None]
    logits = masked_logits(q[:, start:stop], k[:, :stop], causal, softmax_scale)
    return torch.softmax(logits, dim=-1)[0].mean(2).transpose(0, 1).float()


def in_past(start: int, stop: int, device: torch.device) -> Tensor:
    """``s <= t``: bool ``[C, stop]``."""
    positions = torch.arange(start, stop, device=device)[:, None]
    return torch.arange(stop, device=device) <= positions


def in_window(start: int, stop: int, config: NSAConfig, device: torch.device) -> Tensor:
    """``t - w < s <= t``: bool ``[C, stop]``."""
    positions = torch.arange(start, stop, device=device)[:, None]
    recent = torch.arange(stop, device=device) > positions - config.window_size
    return recent & in_past(start, stop, device)


def in_blocks(chosen: Tensor, stop: int, config: NSAConfig) -> Tensor:
    """Tokens of the chosen blocks, the future ones too: ``[C, K, n] -> bool [C, K, stop]``."""
    num_blocks = config.num_blocks(stop)
    # Unused slots (-1) go to a column past the last block, which is then dropped.
    columns = torch.where(chosen < 0, num_blocks, chosen.long())
    member = torch.zeros(*chosen.shape[:2], num_blocks + 1, dtype=torch.bool, device=chosen.device)
    member.scatter_(-1, columns, True)
    return member[..., :num_blocks].repeat_interleave(config.block_size, dim=-1)[..., :stop]


def best_blocks(mass: Tensor, first_position: int, config: NSAConfig) -> Tensor:
    """Most ``mass [C, K, S]`` that n blocks can hold, the forced ones among them: ``[C, K]``."""
    num_queries, _, num_tokens = mass.shape
    num_blocks = config.num_blocks(num_tokens)
    padded = torch.nn.functional.pad(mass, (0, num_blocks * config.block_size - num_tokens))
    per_block = padded.unflatten(-1, (num_blocks, config.block_size)).sum(-1)
    positions = torch.arange(first_position, first_position + num_queries, device=mass.device)
    own = (positions // config.block_size)[:, None]
    blocks = torch.arange(num_blocks, device=mass.device)
    local = (blocks <= own) & (blocks > own - config.num_local_blocks)
    forced = (local | ((blocks < config.num_init_blocks) & (blocks <= own)))[:, None]
    # Forced blocks rank first whatever they hold: no block holds more than 1.
    count = min(config.num_selected_blocks, num_blocks)
    best = torch.topk(per_block + 2.0 * forced, count, dim=-1).indices
    return per_block.gather(-1, best).sum(-1)


def neighbour_overlap(chosen: Tensor) -> Tensor:
    """Share of a query's blocks that the query before it read too: ``[T, K, n] -> [T, K]``."""
    overlap = torch.full(chosen.shape[:2], torch.nan, device=chosen.device)
    now, before = chosen[1:, :, :, None], chosen[:-1, :, None, :]
    shared = ((now == before) & (now >= 0)).any(-1).sum(-1)
    overlap[1:] = shared / (chosen[1:] >= 0).sum(-1)
    return overlap


def _array(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()
