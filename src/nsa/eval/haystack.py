"""Hay for needles: real text as sentences with their tokens, cut to contexts of an exact length.

Not a corpus for training; see ``nsa.train.corpus`` for that.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

# Behind a full stop and before the white space that follows it. Sentences keep their leading white
# space: byte-level tokenizers start a token there, so the tokens of the text are the tokens of its
# sentences one after the other.
_SENTENCE_START = re.compile(r"(?<=[.!?])(?=\s)")


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens int64 ``[length]`` of each text, no special tokens added."""
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray(i, dtype=np.int64) for i in ids]


@dataclass(frozen=True, slots=True)
class Haystack:
    """Texts one after the other, cut into sentences.

    Args:
        tokenizer: of the model that reads the contexts.
        sentences: texts of the sentences, leading white space included.
        tokens: int64 ``[num_tokens]``, the tokens of all sentences.
        starts: int64 ``[num_sentences]``, where each sentence begins in ``tokens``.
    """

    tokenizer: PreTrainedTokenizerBase
    sentences: tuple[str, ...]
    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Haystack:
        """Cuts and encodes ``texts``, in order, an empty line before each.

        Args:
            texts: essays, books, anything with sentences.
            tokenizer: of the model that reads the contexts.

        Raises:
            ValueError: there is no text.

        Example:
            >>> Haystack.from_texts(["A cat. A dog."], tokenizer).sentences[1]
            ' A dog.'
        """
        sentences = [
            sentence
            for text in texts
            if text.strip()
            for sentence in _SENTENCE_START.split(f"\n\n{text.strip()}")
        ]
        if not sentences:
            raise ValueError("haystack: expected text to hide needles in, got none.")
        encoded = encode(tokenizer, sentences)
        sizes = [len(ids) for ids in encoded]
        return cls(
            tokenizer=tokenizer,
            sentences=tuple(sentences),
            tokens=np.concatenate(encoded),
            starts=np.cumsum([0, *sizes[:-1]], dtype=np.int64),
        )

    def cut(self, num_tokens: int, rng: random.Random) -> Context:
        """A piece of exactly ``num_tokens`` tokens that begins with a randomly chosen sentence.

        Args:
            num_tokens: length, at least 1.
            rng: chooses the sentence.

        Raises:
            ValueError: the texts together are shorter than that.
        """
        assert num_tokens > 0, f"num_tokens: expected at least 1, got {num_tokens}"
        choices = int(np.searchsorted(self.starts, len(self.tokens) - num_tokens, side="right"))
        if not choices:
            raise ValueError(
                f"haystack: expected at least {num_tokens} tokens of text, got {len(self.tokens)}. "
                "Give more text or ask for shorter contexts."
            )
        first = rng.randrange(choices)
        start = int(self.starts[first])
        past = int(np.searchsorted(self.starts, start + num_tokens, side="left"))
        return Context(self, first, past, num_tokens)


@dataclass(frozen=True, slots=True)
class Context:
    """A piece of a haystack. Its last sentence may be cut short, to meet the length.

    Args:
        haystack: where it is from.
        first: index of its first sentence.
        past: index behind its last sentence.
        num_tokens: its length.
    """

    haystack: Haystack
    first: int
    past: int
    num_tokens: int

    @property
    def tokens(self) -> np.ndarray:
        """int64 ``[num_tokens]``."""
        start = self.haystack.starts[self.first]
        return self.haystack.tokens[start : start + self.num_tokens]

    @property
    def sentences(self) -> tuple[str, ...]:
        """The sentences, the last one in full even if its tokens are cut."""
        return self.haystack.sentences[self.first : self.past]

    @property
    def boundaries(self) -> np.ndarray:
        """int64 ``[sentences + 1]``: where in ``tokens`` a sentence begins, then the end."""
        inside = self.haystack.starts[self.first : self.past] - self.haystack.starts[self.first]
        return np.append(inside, self.num_tokens)
