"""Perplexity by position: how much further text helps, and where a model stops following it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nsa.eval.settings import PerplexitySettings
from nsa.train.tokenizer import encode_documents
from nsa.train.validation import PositionLosses, position_losses


def perplexity_by_position(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: PerplexitySettings,
    *,
    num_positions: int,
    on_documents: Callable[[int], None] | None = None,
) -> PositionLosses:
    """Reads documents from their start and averages the loss by distance from it.

    Documents are encoded as in training. One that is shorter than ``settings.max_tokens`` counts
    where it has tokens.

    Args:
        model: causal language model.
        tokenizer: the model's.
        texts: documents.
        settings: how far to read and the bins.
        num_positions: the most the model can read.
        on_documents: called with the number of documents done, for a progress bar.

    Returns:
        Losses in nats per token, per bin and in all.

    Raises:
        ValueError: ``max_tokens`` is more than the model can read, or ill-formed bins.
    """
    max_tokens = settings.max_tokens or num_positions
    if max_tokens > num_positions:
        raise ValueError(
            f"perplexity.max_tokens: expected at most {num_positions}, the positions of the model, "
            f"got {max_tokens}."
        )
    return position_losses(
        model,
        list(encode_documents(tokenizer, texts)),
        max_len=max_tokens,
        bin_edges=settings.bin_edges,
        on_documents=on_documents,
    )
