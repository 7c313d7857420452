"""Loss of a causal language model on whole documents, by distance from the start of the document.

Not an evaluation harness: one computation, which training reports as its validation loss and
evaluation builds on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from transformers import PreTrainedModel

# Rows of logits held at once. 1024 rows of a vocabulary of 128k in float32 are half a gibibyte.
_LOGIT_ROWS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLosses:
    """Cross-entropy in nats per predicted token.

    The token at position ``p`` (0-based) of a document is predicted from the ``p`` tokens before
    it; bin ``i`` holds the positions ``bin_edges[i] <= p < bin_edges[i + 1]``.

    Args:
        loss: mean over all predicted tokens.
        num_tokens: predicted tokens.
        num_documents: documents read.
        bin_edges: ``bins + 1`` positions.
        bin_losses: mean of each bin, NaN where it has no token.
        bin_tokens: predicted tokens in each bin.
    """

    loss: float
    num_tokens: int
    num_documents: int
    bin_edges: tuple[int, ...]
    bin_losses: tuple[float, ...]
    bin_tokens: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinity where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def default_bin_edges(max_len: int) -> tuple[int, ...]:
    """Edges 1, 64, 128, 256, ... up to ``max_len``: equal ratios, since losses fall like powers.

    Example:
        >>> default_bin_edges(300)
        (1, 64, 128, 256, 300)
    """
    doubling = (64 << i for i in range(max_len.bit_length()))
    return (1, *(edge for edge in doubling if edge < max_len), max_len)


def consecutive_pieces(
    token_documents: Sequence[Sequence[int] | np.ndarray], max_len: int
) -> list[Sequence[int] | np.ndarray]:
    """Cuts documents into consecutive pieces of ``max_len`` tokens, as training does.

    Each is to be read as a sequence of its own, so that long documents count as a whole: a token's
    position is then that in its piece. Nothing before the first token of a piece predicts it; a
    last piece of one token is left out.

    Example:
        >>> consecutive_pieces([[1, 2, 3, 4, 5], [6, 7]], 2)
        [[1, 2], [3, 4], [6, 7]]
    """
    return [
        document[start : start + max_len]
        for document in token_documents
        for start in range(0, len(document) - 1, max_len)
    ]


@torch.no_grad()
def position_losses(
    model: PreTrainedModel | nn.Module,
    token_documents: Sequence[Sequence[int] | np.ndarray],
    *,
    max_len: int,
    bin_edges: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    on_documents: Callable[[int], None] | None = None,
) -> PositionLosses:
    """Cross-entropy of each document, read from its start up to ``max_len`` tokens.

    Works for any causal language model of transformers. Documents of similar length share a
    right-padded batch; no mask is needed, since a causal model cannot see padding that follows. In
    a distributed run every process must call it with the same arguments; the batches are dealt out
    and every process returns the whole result.

    Args:
        model: has a base model and an output embedding, and is put back in the mode it was in.
        token_documents: token ids of each document, start token included if the model is used with
            one.
        max_len: tokens read of each document; the rest is not looked at unless
            :func:`consecutive_pieces` cut it.
        bin_edges: increasing positions from 1; :func:`default_bin_edges` if None. Tokens outside
            count in ``loss`` only.
        batch_tokens: padded tokens per forward pass, ``max_len`` if None; one document always fits.
        on_documents: called with the number of documents done, for a progress bar.

    Returns:
        Losses per bin and in all.

    Raises:
        ValueError: no document, one shorter than 2 tokens, or edges that do not increase.

    Example:
        >>> position_losses(model, [tokenizer.encode(text)], max_len=4096).perplexity
    """
    edges = np.asarray(default_bin_edges(max_len) if bin_edges is None else bin_edges)
    _check(token_documents, max_len, edges)
    batches = _batches(token_documents, max_len, batch_tokens or max_len)
    rank, world_size = _rank()
    # Sum and count per bin, then of everything.
    totals = np.zeros((2, len(edges)), dtype=np.float64)
    was_training = model.training
    model.eval()
    done = 0
    try:
        for first in range(0, len(batches), world_size):
            mine = first + rank
            # Sharded models need every process in every forward pass: late ones repeat a batch,
            # uncounted.
            batch = batches[min(mine, len(batches) - 1)]
            losses, positions = _batch_losses(model, [token_documents[i] for i in batch], max_len)
            if mine < len(batches):
                _add(totals, losses, positions, edges)
            done += sum(len(b) for b in batches[first : first + world_size])
            if on_documents is not None:
                on_documents(done)
    finally:
        model.train(was_training)
    if world_size > 1:
        shared = torch.from_numpy(totals).to(_device(model))
        dist.all_reduce(shared)
        totals = shared.cpu().numpy()
    return _result(totals, edges, len(token_documents))


def _check(
    documents: Sequence[Sequence[int] | np.ndarray], max_len: int, edges: np.ndarray
) -> None:
    if max_len < 2:
        raise ValueError(
            f"max_len: expected at least 2 tokens, so that one is predicted, got {max_len}."
        )
    if len(edges) < 2 or edges[0] < 1 or (np.diff(edges) <= 0).any():
        raise ValueError(
            f"bin_edges: expected at least two increasing positions from 1, got {edges.tolist()}."
        )
    if not len(documents):
        raise ValueError("token_documents: expected at least one document, got none.")
    for index, document in enumerate(documents):
        if len(document) < 2:
            raise ValueError(
                f"token_documents[{index}]: expected at least 2 tokens, so that one is predicted, "
                f"got {len(document)}. Leave such documents out."
            )


def _batches(
    documents: Sequence[Sequence[int] | np.ndarray], max_len: int, batch_tokens: int
) -> list[list[int]]:
    """Documents of similar length, at most ``batch_tokens`` padded tokens; longest first."""
    order = sorted(range(len(documents)), key=lambda i: -min(len(documents[i]), max_len))
    batches: list[list[int]] = []
    widest = 0
    for index in order:
        if batches and (len(batches[-1]) + 1) * widest <= batch_tokens:
            batches[-1].append(index)
        else:
            widest = min(len(documents[index]), max_len)
            batches.append([index])
    return batches


def _batch_losses(
    model: nn.Module, documents: Sequence[Sequence[int] | np.ndarray], max_len: int
) -> tuple[Tensor, Tensor]:
    """Losses float32 and positions int64 of every predicted token, both ``[predicted]``."""
    cut = [torch.from_numpy(np.asarray(d[:max_len]).astype(np.int64)) for d in documents]
    ids = nn.utils.rnn.pad_sequence(cut, batch_first=True).to(_device(model))
    lengths = torch.tensor([len(d) for d in cut], device=ids.device)
    positions = torch.arange(1, ids.shape[1], device=ids.device).expand(len(cut), -1)
    real = positions < lengths[:, None]
    targets = ids[:, 1:][real]
    return _token_losses(model, ids, real, targets), positions[real]


def _token_losses(model: nn.Module, ids: Tensor, real: Tensor, targets: Tensor) -> Tensor:
    if isinstance(model, FSDPModule):
        # Weights of a sharded model are whole only inside its own forward pass, so its logits come
        # all at once.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][real]
        return functional.cross_entropy(logits.float(), targets, reduction="none")
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # pyright: ignore[reportCallIssue]
    hidden = hidden[:, :-1][real]
    losses = [
        functional.cross_entropy(head(rows).float(), wanted, reduction="none")
        for rows, wanted in zip(hidden.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True)
    ]
    return torch.cat(losses)


def _add(totals: np.ndarray, losses: Tensor, positions: Tensor, edges: np.ndarray) -> None:
    nats = losses.double().cpu().numpy()
    bins = np.searchsorted(edges, positions.cpu().numpy(), side="right") - 1
    inside = (bins >= 0) & (bins < len(edges) - 1)
    num_bins = len(edges) - 1
    totals[0, :-1] += np.bincount(bins[inside], weights=nats[inside], minlength=num_bins)
    totals[1, :-1] += np.bincount(bins[inside], minlength=num_bins)
    totals[:, -1] += nats.sum(), len(nats)


def _result(totals: np.ndarray, edges: np.ndarray, num_documents: int) -> PositionLosses:
    sums, counts = totals
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return PositionLosses(
        loss=float(means[-1]),
        num_tokens=int(counts[-1]),
        num_documents=num_documents,
        bin_edges=tuple(int(e) for e in edges),
        bin_losses=tuple(float(m) for m in means[:-1]),
        bin_tokens=tuple(int(c) for c in counts[:-1]),
    )


def _rank() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
