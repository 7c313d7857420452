"""From a model folder and a text file to the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nsa.inspect.page import render_page
from nsa.inspect.tracing import trace
from nsa.serve import text as text_models
from nsa.train.files import write_text
from nsa.train.tokenizer import start_tokens


def inspect_text(
    model: Path,
    text: Path,
    output: Path,
    *,
    device: torch.device,
    twin: Path | None = None,
    max_tokens: int = 1024,
    layers: Sequence[int] | None = None,
) -> int:
    """Writes the page that shows where a model looks while it reads a text.

    Args:
        model: folder of a trained model.
        text: UTF-8 file.
        output: the page; replaced as a whole.
        device: where the model runs.
        twin: folder of the dense twin, or of the dense model that ``model`` was converted from, to
            measure which share of its attention is kept.
        max_tokens: how much of the text is read, from its start. The page grows with its square.
        layers: which layers are shown, all if None.

    Returns:
        The number of tokens read.

    Raises:
        ValueError: an empty text, or one that is not UTF-8; a model or layers that do not fit.

    Example:
        >>> inspect_text(Path("runs/demo/nsa/model"), Path("a.txt"), Path("a.html"),
        ...              device=torch.device("cpu"))
        1024
    """
    written = text_models.read_prompt(text)
    if not written.strip():
        raise ValueError(f"{text}: expected some text, found none.")
    loaded = text_models.load(model, device=device)
    other = None if twin is None else text_models.load(twin, device=device).model
    vocab_size = loaded.model.config.vocab_size
    if other is not None and other.config.vocab_size != vocab_size:
        raise ValueError(
            f"twin: expected the model's vocabulary of {vocab_size} tokens, got "
            f"{other.config.vocab_size}. Pass a dense model that reads the same tokens."
        )
    limit = min(max_tokens, loaded.model.config.max_position_embeddings)
    ids, pieces = tokenize(loaded.tokenizer, written, limit)
    looked = trace(loaded.model, ids, twin=other, layers=layers)
    write_text(output, render_page(looked, pieces, model_name=str(model)))
    return looked.num_tokens


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int
) -> tuple[list[int], list[str]]:
    """The first tokens of a text, and the text cut into one piece per token.

    The pieces joined are the text. A character of several tokens stands with the last of them; the
    others, and tokens that no text stands for, are empty or show the tokenizer's name for them.

    Args:
        tokenizer: of the model.
        text: to encode, without special tokens but the start token if the tokenizer adds it.
        max_tokens: of the result.

    Returns:
        Token ids and pieces, equally many.
    """
    start = start_tokens(tokenizer)
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    if not tokenizer.is_fast:
        ids = tokenizer(text, **options)["input_ids"][: max_tokens - len(start)]
        pieces = [str(tokenizer.decode([token])) for token in ids]
    else:
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
        ids = encoded["input_ids"][: max_tokens - len(start)]
        offsets = encoded["offset_mapping"]
        # What lies between two tokens (white space that was trimmed) belongs to the later one; of
        # several tokens that share a character the last one shows it.
        begins = [begin for begin, _ in offsets[: len(ids) + 1]]
        pieces, at = [], 0
        for index, (_, end) in enumerate(offsets[: len(ids)]):
            shared = index + 1 < len(begins) and begins[index + 1] < end
            stop = max(at, begins[index + 1] if shared else end)
            pieces.append(text[at:stop])
            at = stop
    return [*start, *ids], [*[str(tokenizer.bos_token)] * len(start), *pieces]
