"""An independent statement of the algorithm, as explicit loops over queries, heads and blocks.

It shares no code with ``nsa.reference``, runs in any float dtype, and leaves gradients to autograd.
Functions take one sequence, ``[tokens, heads, dim]``; ``batched`` and ``packed`` take many.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsa.config import NSAConfig


def attend(
    q: Tensor, k: Tensor, v: Tensor, sees: Callable[[int, int], list[int]], scale: float
) -> tuple[Tensor, Tensor]:
    """``o [T, H, Dv]`` and ``lse [T, H]``; ``sees(t, kv_head)`` lists the keys of query ``t``."""
    num_queries, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    o, lse = [], []
    for t in range(num_queries):
        for h in range(num_heads):
            keys = sees(t, h // group)
            if not keys:
                o.append(q.new_zeros(v.shape[-1]))
                lse.append(q.new_full((), -torch.inf))
                continue
            logits = scale * (k[keys, h // group] @ q[t, h])
            o.append(torch.softmax(logits, 0) @ v[keys, h // group])
            lse.append(torch.logsumexp(logits, 0))
    if not o:
        return q.new_zeros(0, num_heads, v.shape[-1]), q.new_zeros(0, num_heads)
    return (
        torch.stack(o).view(num_queries, num_heads, -1),
        torch.stack(lse).view(num_queries, num_heads),
    )


def compress(
    x: Tensor,
    pe: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    *,
    kind: str,
    size: int,
    stride: int,
) -> Tensor:
    """Compressed blocks ``[T_c, K, D]`` of ``x [T, K, D]``."""
    blocks = []
    start = 0
    while start + size <= x.shape[0]:
        for head in range(x.shape[1]):
            block = x[start : start + size, head]
            if pe is not None:
                block = block + pe[head]
            blocks.append(_phi(block, w1, w2, kind))
        start += stride
    if not blocks:
        return x.new_zeros(0, *x.shape[1:])
    return torch.stack(blocks).view(-1, *x.shape[1:])


def _phi(block: Tensor, w1: Tensor | None, w2: Tensor | None, kind: str) -> Tensor:
    """One block ``[l, D]`` to ``[D]``."""
    mean = sum(block.unbind(0)) / block.shape[0]
    flat = torch.cat(list(block.unbind(0)))
    if kind == "mean":
        return mean
    if kind == "linear":
        return w1 @ flat
    if kind == "gated":
        logits = torch.stack([w1 @ row for row in block])
        weights = torch.exp(logits - logits.max(0).values)
        return (weights / weights.sum(0) * block).sum(0)
    hidden = w1 @ flat
    return mean + w2 @ (hidden / (1 + torch.exp(-hidden)))


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, config: NSAConfig, scale: float, offset: int = 0
) -> tuple[Tensor, Tensor]:
    return attend(q, k_cmp, v_cmp, _compressed_keys(k_cmp.shape[0], config, offset), scale)


def _compressed_keys(num_blocks: int, config: NSAConfig, offset: int):
    def sees(t: int, kv_head: int) -> list[int]:
        size, stride = config.compress_block_size, config.compress_stride
        return [i for i in range(num_blocks) if i * stride + size - 1 <= offset + t]

    return sees


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    scale: float,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    chosen = block_indices.tolist()

    def sees(t: int, kv_head: int) -> list[int]:
        return [s for s in range(offset + t + 1) if s // block_size in chosen[t][kv_head]]

    return attend(q, k, v, sees, scale)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, scale: float, offset: int = 0
) -> tuple[Tensor, Tensor]:
    def sees(t: int, kv_head: int) -> list[int]:
        return [s for s in range(offset + t + 1) if s > offset + t - window_size]

    return attend(q, k, v, sees, scale)


def block_scores(
    q: Tensor, k_cmp: Tensor, *, config: NSAConfig, scale: float, offset: int = 0
) -> list[list[list[float]]]:
    """``p_slc'[t][kv_head][j]`` for the candidates ``j * l' <= t``: eq. 8 to 10, sum by sum."""
    num_queries, num_heads, _ = q.shape
    num_kv_heads = k_cmp.shape[1]
    group = num_heads // num_kv_heads
    per_block = config.block_size // config.compress_stride
    per_window = config.compress_block_size // config.compress_stride
    sees = _compressed_keys(k_cmp.shape[0], config, offset)
    scores = []
    for t in range(num_queries):
        keys = sees(t, 0)
        candidates = range((offset + t) // config.block_size + 1)
        rows = [[0.0 for _ in candidates] for _ in range(num_kv_heads)]
        for h in range(num_heads if keys else 0):
            p = torch.softmax(scale * (k_cmp[keys, h // group] @ q[t, h]), 0).tolist()
            for j in candidates:
                for m in range(per_block):
                    for r in range(per_window):
                        i = per_block * j + m - r
                        if 0 <= i < len(p):
                            rows[h // group][j] += p[i]
        scores.append(rows)
    return scores


def select_blocks(
    q: Tensor, k_cmp: Tensor, *, config: NSAConfig, scale: float, offset: int = 0
) -> Tensor:
    """int32 ``[T, K, n]``, ascending, -1 at the end."""
    scores = block_scores(q, k_cmp, config=config, scale=scale, offset=offset)
    n = config.num_selected_blocks
    chosen = torch.full((q.shape[0], k_cmp.shape[1], n), -1, dtype=torch.int32)
    for t, rows in enumerate(scores):
        own = (offset + t) // config.block_size
        for head, row in enumerate(rows):
            forced = [
                j
                for j in range(own + 1)
                if j < config.num_init_blocks or own - j < config.num_local_blocks
            ]
            free = [j for j in range(own + 1) if j not in forced]
            # Python's sort is stable, so equal scores stay in order: the lower block wins.
            free.sort(key=lambda j, row=row: -row[j])
            best = sorted(forced + free[: n - len(forced)])
            chosen[t, head, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return chosen


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    block_indices: Tensor,
    *,
    config: NSAConfig,
    scale: float,
    offset: int = 0,
) -> Tensor:
    """Eq. 5, given the choice of blocks."""
    common = {"scale": scale, "offset": offset}
    branches = (
        compressed_attention(q, k_cmp, v_cmp, config=config, **common),
        selected_attention(q, k_slc, v_slc, block_indices, block_size=config.block_size, **common),
        window_attention(q, k_win, v_win, window_size=config.window_size, **common),
    )
    return sum(gates[:, :, c, None] * o for c, (o, _) in enumerate(branches))


def batched(function: Callable, *tensors: Tensor):
    """``function`` on every sequence of ``[B, T, ...]`` tensors."""
    return _collect([function(*pieces) for pieces in zip(*tensors, strict=True)], torch.stack)


def packed(
    function: Callable,
    *tensors: Tensor,
    lengths: tuple[int, ...],
    slots: tuple[int, ...],
    config: NSAConfig,
    into_slots: bool = False,
):
    """``function`` on every sequence of packed tensors.

    Args:
        function: takes and returns tensors of one sequence.
        tensors: packed tensors.
        lengths: tokens of each sequence.
        slots: which of the tensors hold compressed blocks, one sequence from slot
            ``start // stride`` on.
        config: block sizes.
        into_slots: the result holds compressed blocks too; unused slots are 0.
    """
    pieces, start = [], 0
    for length in lengths:
        slot, blocks = start // config.compress_stride, config.num_compressed(length)
        cut = [
            x[slot : slot + blocks] if i in slots else x[start : start + length]
            for i, x in enumerate(tensors)
        ]
        piece = function(*cut)
        if into_slots:
            end = (start + length) // config.compress_stride
            gap = piece.new_zeros(end - slot - blocks, *piece.shape[1:])
            piece = torch.cat([piece, gap])
        pieces.append(piece)
        start += length
    return _collect(pieces, torch.cat)


def _collect(results: list, join: Callable):
    if isinstance(results[0], Tensor):
        return join(results)
    return tuple(join(list(parts)) for parts in zip(*results, strict=True))
