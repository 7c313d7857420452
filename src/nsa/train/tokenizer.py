"""A byte-level BPE tokenizer: trained on the corpus or loaded, always saved with the run.

Not a tokenizer implementation: the work is done by the ``tokenizers`` library.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Also makes our models known to AutoTokenizer, which warns of a folder of another.
from nsa.models.loading import read_tokenizer

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"

# 256 byte values and the two special tokens: below this some text could not be written.
MIN_VOCAB_SIZE = 258

# BPE merges settle long before this much text; more only makes the first minutes of a run longer.
TRAIN_TEXT_CHARS = 100_000_000


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """Trains byte-level BPE, so that every string can be encoded and decodes to itself.

    Args:
        texts: documents; reading stops after :data:`TRAIN_TEXT_CHARS` characters.
        vocab_size: tokens in all, the 256 bytes and two special tokens included. A small corpus may
            give fewer.

    Returns:
        A tokenizer with ``<|endoftext|>`` as start and end of a document and ``<|padding|>`` for
        padding. It begins every text with the start token, as documents begin in training.

    Raises:
        ValueError: ``vocab_size`` is below 258, or there is no text.

    Example:
        >>> tokenizer = train_tokenizer(["to be or not to be"] * 10, vocab_size=270)
        >>> tokenizer.decode(tokenizer.encode("not to be"))
        '<|endoftext|>not to be'
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"tokenizer.vocab_size: expected at least {MIN_VOCAB_SIZE} (256 bytes and two special "
            f"tokens), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    taken = _Taken(texts)
    tokenizer.train_from_iterator(taken, trainer=trainer)
    if not taken.num_chars:
        raise ValueError("tokenizer: expected text to train on, got none. Check data.train.")
    return with_start_token(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            pad_token=PADDING,
            clean_up_tokenization_spaces=False,
        )
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer to train with, from a folder or from the Hugging Face Hub.

    Args:
        path: folder with ``tokenizer.json``, or a name on the Hub.

    Returns:
        The tokenizer, see :func:`with_start_token`.

    Raises:
        ValueError: nothing loadable there, a file is cut short, or it has no end-of-text token.
    """
    tokenizer = read_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: expected an end-of-text token (eos_token) in {str(path)!r}, found none. "
            "Add one, since documents are closed with it."
        )
    return with_start_token(tokenizer)


def with_start_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that begins every text with its start token.

    Saved with a model, it lets every program that reads a prompt (``generate``, lm-eval, a server)
    begin where the training documents began.

    Args:
        tokenizer: stays as it is.

    Returns:
        A copy, or ``tokenizer`` itself where it does so already, has no start token, or is not a
        fast one.
    """
    start = tokenizer.bos_token_id
    if not isinstance(start, int) or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    if start_tokens(tokenizer):
        return tokenizer
    starting = copy.deepcopy(tokenizer)
    name = str(starting.bos_token)
    template = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A $B:1", special_tokens=[(name, start)]
    )
    present = starting.backend_tokenizer.post_processor
    starting.backend_tokenizer.post_processor = (
        template if present is None else processors.Sequence([present, template])
    )
    return starting


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token if ``tokenizer`` begins texts with it, else nothing."""
    start = tokenizer.bos_token_id
    if isinstance(start, int) and tokenizer("a")["input_ids"][:1] == [start]:
        return [start]
    return []


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Iterator[list[int]]:
    """Encodes whole documents: start token (see :func:`start_tokens`), text, end token.

    Text that spells a special token is encoded as plain text, so that a document cannot close
    itself.

    Args:
        tokenizer: from this module.
        texts: documents.

    Yields:
        Token ids, one list per document.
    """
    start = start_tokens(tokenizer)
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
    )
    for ids in encoded["input_ids"]:
        yield [*start, *ids, *end]


class _Taken:
    """Passes texts on until the limit, counting characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.num_chars = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            yield text
            self.num_chars += len(text)
            if self.num_chars >= TRAIN_TEXT_CHARS:
                return
