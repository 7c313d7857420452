"""Softmax attention under a visibility mask, forward and backward (eq. 1-2).

This is the arithmetic that all three branches share. A branch is fully described by which keys each
query sees. It says so through a function ``keys_of(start, stop)`` that returns, for the queries
``start .. stop - 1``, a key range ``lo, hi`` and the mask inside that range.

Shapes: ``B`` batch, ``C`` queries of a chunk, ``S`` keys, ``H`` query heads, ``K`` kv heads,
``G = H / K``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

KeysOf = Callable[[int, int], tuple[int, int, Tensor]]

# Elements of one chunk's score matrix. 4 MiB of float32 stay in the cache of a laptop core; a GPU
# wants few large products.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}


def query_chunks(
    num_queries: int, scores_per_query: int, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Ranges ``(start, stop)`` whose score matrices hold about ``CHUNK_ELEMENTS`` entries."""
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"])
    size = max(1, elements // max(1, scores_per_query))
    for start in range(0, num_queries, size):
        yield start, min(start + size, num_queries)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype the arithmetic runs in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def masked_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, *, keys_of: KeysOf, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the keys it sees.

    Args:
        q: ``[B, T, H, Dk]``.
        k: ``[B, S, K, Dk]``.
        v: ``[B, S, K, Dv]``.
        keys_of: key range and boolean mask, broadcastable to ``[B, C, K, S]``, of a chunk of
            queries.
        softmax_scale: factor of the logits.

    Returns:
        ``o [B, T, H, Dv]`` in q's dtype and ``lse [B, T, H]``, natural log, in the compute dtype. A
        query that sees nothing gets ``o = 0`` and ``lse = -inf``.
    """
    batch, num_queries, num_heads, _ = q.shape
    o = torch.zeros(batch, num_queries, num_heads, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.full(
        (batch, num_queries, num_heads), -torch.inf, dtype=compute_dtype(q), device=q.device
    )
    for start, stop in query_chunks(num_queries, batch * num_heads * k.shape[1], q.device):
        lo, hi, visible = keys_of(start, stop)
        if hi <= lo:
            continue
        logits = masked_logits(q[:, start:stop], k[:, lo:hi], visible, softmax_scale)
        # Not exp(logits - lse): rounding a large lse would scale the whole row.
        peak = logits.amax(-1, keepdim=True)
        weights = torch.exp(logits.sub_(peak.masked_fill(peak == -torch.inf, 0.0)))
        total = weights.sum(-1, keepdim=True)
        values = weights.flatten(2, 3) @ _heads_first(v[:, lo:hi])
        values /= total.masked_fill(total == 0, 1.0).flatten(2, 3)
        o[:, start:stop] = _ungroup(values, stop - start).to(q.dtype)
        chunk_lse = (peak + torch.log(total)).flatten(2, 3)
        lse[:, start:stop] = _ungroup(chunk_lse, stop - start)[..., 0]
    return o, lse


def masked_attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    keys_of: KeysOf,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``masked_attention_fwd``: ``(dq, dk, dv)``, each in the dtype of its input.

    With ``p`` the probabilities, ``dp = do v^T`` and ``delta = sum(do * o)``, the gradient of the
    logits is ``ds = p * (dp - delta + dlse)``.
    """
    batch, num_queries, num_heads, _ = q.shape
    wide = compute_dtype(q)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=wide, device=k.device)
    dv = torch.zeros(v.shape, dtype=wide, device=v.device)
    num_kv_heads = k.shape[2]
    for start, stop in query_chunks(num_queries, batch * num_heads * k.shape[1], q.device):
        lo, hi, visible = keys_of(start, stop)
        if hi <= lo:
            continue
        chunk = slice(start, stop)
        logits = masked_logits(q[:, chunk], k[:, lo:hi], visible, softmax_scale)
        chunk_lse = _group(lse[:, chunk, :, None], num_kv_heads)
        probs = probabilities(logits, chunk_lse.view(logits.shape[:-1])).flatten(2, 3)
        do_rows = _group(do[:, chunk], num_kv_heads)
        shift = -(do_rows * _group(o[:, chunk], num_kv_heads)).sum(-1, keepdim=True)
        if dlse is not None:
            shift = shift + _group(dlse[:, chunk, :, None], num_kv_heads)
        ds = probs * (do_rows @ _heads_first(v[:, lo:hi]).mT + shift) * softmax_scale
        dq[:, chunk] = _ungroup(ds @ _heads_first(k[:, lo:hi]), stop - start).to(q.dtype)
        dk[:, lo:hi] += (ds.mT @ _group(q[:, chunk], num_kv_heads)).transpose(1, 2)
        dv[:, lo:hi] += (probs.mT @ do_rows).transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def masked_logits(q: Tensor, k: Tensor, visible: Tensor, softmax_scale: float) -> Tensor:
    """Scaled logits ``[B, K, C, G, S]`` in the compute dtype, ``-inf`` where not visible."""
    num_queries, num_kv_heads = q.shape[1], k.shape[2]
    logits = (_group(q, num_kv_heads) @ _heads_first(k).mT) * softmax_scale
    logits = logits.unflatten(2, (num_queries, -1))
    return logits.masked_fill_(~visible.transpose(1, 2).unsqueeze(3), -torch.inf)


def probabilities(logits: Tensor, lse: Tensor) -> Tensor:
    """Softmax from a saved log-sum-exp; rows that see nothing (``lse = -inf``) are 0, never NaN."""
    probs = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    # Rounding a large lse scales the whole row, so its sum is near 1, not 1.
    return probs.div_(probs.sum(-1, keepdim=True).clamp_min_(0.5))


def _group(x: Tensor, num_kv_heads: int) -> Tensor:
    """``[B, C, H, D] -> [B, K, C * G, D]``, compute dtype: rows of one kv head lie together."""
    x = x.to(compute_dtype(x)).unflatten(2, (num_kv_heads, -1))
    return x.permute(0, 2, 1, 3, 4).flatten(2, 3)


def _ungroup(x: Tensor, num_queries: int) -> Tensor:
    """``[B, K, C * G, D] -> [B, C, H, D]``: undoes ``_group``."""
    return x.unflatten(2, (num_queries, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)


def _heads_first(x: Tensor) -> Tensor:
    """``[B, S, K, D] -> [B, K, S, D]`` in the compute dtype."""
    return x.to(compute_dtype(x)).transpose(1, 2)
