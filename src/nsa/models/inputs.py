"""What callers may pass to the model: checks of ids, embeddings, labels and extra arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from nsa.models.batching import find_packing
from nsa.ops.checks import describe, readable

# What callers of transformers' models pass along, and what needs no action here.
_ACCEPTED = frozenset(
    {
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "max_length_k",
        "max_length_q",
        "output_attentions",
        "token_type_ids",
    }
)

# With a cache, a row may be padding alone for now: chunks of a left-padded batch begin so.
EMPTY_ROW = (
    "attention_mask: expected a real token in each row, got a row of padding alone. Leave it out, "
    "or begin it with a start token."
)


def packing(
    cu_seqlens: Tensor | None,
    kwargs: dict[str, Any],
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
) -> Tensor | None:
    """Bounds of packed sequences: as given, under transformers' name, or from the positions."""
    if cu_seqlens is None:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None and attention_mask is None and past_key_values is None:
        cu_seqlens = find_packing(position_ids)
    return cu_seqlens


def check_extras(kwargs: dict[str, Any]) -> None:
    """Refuses what would otherwise be ignored."""
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions: expected False, since no attention matrix is ever formed. See "
            "which blocks are read with `nsa inspect`."
        )
    unknown = sorted(set(kwargs) - _ACCEPTED)
    if unknown:
        raise ValueError(f"forward: unexpected argument(s) {', '.join(unknown)}.")


def check_ids(name: str, ids: Tensor, vocab_size: int, *, ignored: int = 0) -> None:
    """Integers ``[batch, seq]`` of the vocabulary, ``ignored`` apart."""
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}: expected int64 [batch, seq], got {describe(ids)}. Cast it with .long(), and "
            "give one text the shape [1, seq]."
        )
    # On a GPU the embedding itself asserts, and asking here would wait for the GPU.
    if readable(ids):
        outside = ((ids < 0) | (ids >= vocab_size)) & (ids != ignored)
        if bool(outside.any()):
            raise ValueError(
                f"{name}: expected ids from 0 to {vocab_size - 1}, got {int(ids[outside][0])}. "
                "Tokenizer and model do not belong together."
            )


def check_embeds(inputs_embeds: Tensor, hidden_size: int) -> None:
    """Floats ``[batch, seq, hidden_size]``."""
    shape = inputs_embeds.shape
    if len(shape) != 3 or shape[2] != hidden_size or not inputs_embeds.is_floating_point():
        raise ValueError(
            f"inputs_embeds: expected floats [batch, seq, hidden_size = {hidden_size}], got "
            f"{describe(inputs_embeds)}."
        )


def check_labels(labels: Tensor, given: Tensor | None, vocab_size: int) -> None:
    """Ids like the input, ``given`` or None, or -100."""
    if given is not None and labels.shape != given.shape[:2]:
        raise ValueError(
            f"labels: expected int64 {list(given.shape[:2])} like the input, got "
            f"{describe(labels)}. They are shifted here: pass the input's own tokens."
        )
    check_ids("labels", labels, vocab_size, ignored=-100)
