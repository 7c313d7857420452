"""Needle in a haystack: a sentence with a number is hidden in real text and asked for at the end.

Needles can be alone or among others with different keys (multi-key). Contexts have an exact number
of tokens and every sample depends on nothing but the seed and its own place in the grid. The same
generator writes documents to train on, since small models have to be taught the task.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from nsa.eval.haystack import Haystack, encode
from nsa.train.tokenizer import start_tokens

_FIRST_WORDS = (
    "amber ancient brave bright calm clever copper crimson curious distant eager early emerald "
    "famous fearless gentle golden graceful hidden honest humble icy ivory jolly late lively loyal "
    "lucky misty modern noble patient polite quick quiet rapid restless rusty scarlet shiny silent "
    "silver smooth stormy sturdy tender velvet violet wandering wild"
)
_SECOND_WORDS = (
    "anchor arrow badger beacon bottle bridge candle castle cedar cherry comet cottage desert "
    "dolphin eagle engine falcon feather forest garden glacier hammer harbor harvest island jungle "
    "kettle lantern lemon lizard marble meadow mirror mountain needle ocean orchard otter parrot "
    "pebble pepper piano pigeon planet prairie ribbon river rocket saddle sparrow spider teapot "
    "temple thunder ticket tiger tower tunnel valley violin walnut whistle window winter"
)
KEYS = tuple(
    f"{first} {second}" for first, second in product(_FIRST_WORDS.split(), _SECOND_WORDS.split())
)

MAX_NUM_DIGITS = 18

_DIGITS = re.compile(r"\s*(\d+)")


class Needle(NamedTuple):
    """What is hidden: a number and what it is called."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """How it stands in the text."""
        return f" The special magic number for the {self.key} is {self.value}."

    @property
    def question(self) -> str:
        """How it is asked for, up to where the number has to follow."""
        return (
            f"\n\nWhat is the special magic number for the {self.key}?\n"
            f"The special magic number for the {self.key} is"
        )

    @property
    def answer(self) -> str:
        """The right continuation of the question."""
        return f" {self.value}."

    def found_in(self, continuation: str) -> bool:
        """Whether a continuation of the question begins with exactly this number."""
        match = _DIGITS.match(continuation)
        return match is not None and match[1] == self.value


@dataclass(frozen=True, slots=True)
class NeedleSample:
    """One question.

    Args:
        needle: the needle that is asked for.
        prompt: int64 ``[length]``, start token (if the tokenizer has one), text, question.
        position: index in ``prompt`` of the needle's first token.
    """

    needle: Needle
    prompt: np.ndarray
    position: int


def needle_sample(
    haystack: Haystack,
    *,
    length: int,
    depth: float,
    num_keys: int,
    num_digits: int,
    rng: random.Random,
) -> NeedleSample:
    """Hides needles in a piece of the haystack and asks for one of them.

    Args:
        haystack: text to hide them in.
        length: tokens of the prompt, exactly.
        depth: where the needle asked for is, from 0 (start of the text) to 1 (end), moved to the
            nearest start of a sentence.
        num_keys: needles in all; the others are anywhere.
        num_digits: digits of each number.
        rng: chooses text, keys, numbers and the places of the other needles.

    Returns:
        The sample.

    Raises:
        ValueError: the length leaves no room for text, or the haystack is shorter than that.

    Example:
        >>> sample = needle_sample(haystack, length=4096, depth=0.5, num_keys=1, num_digits=7,
        ...                        rng=random.Random(0))
        >>> len(sample.prompt)
        4096
    """
    needles = make_needles(num_keys, num_digits, rng)
    hidden = encode(haystack.tokenizer, [n.sentence for n in needles])
    (question,) = encode(haystack.tokenizer, [needles[0].question])
    head = np.array(start_tokens(haystack.tokenizer), dtype=np.int64)
    room = _room(length, [head, *hidden, question])
    context = haystack.cut(room, rng)
    boundaries = context.boundaries
    wanted = int(boundaries[np.abs(boundaries - depth * room).argmin()])
    places = [wanted, *(int(rng.choice(boundaries)) for _ in needles[1:])]
    # By place, in random order where several share one (Python's sort is stable).
    order = sorted(rng.sample(range(num_keys), num_keys), key=lambda i: places[i])
    pieces = [head]
    position = done = 0
    for index in order:
        pieces.append(context.tokens[done : places[index]])
        done = places[index]
        if index == 0:
            position = sum(len(piece) for piece in pieces)
        pieces.append(hidden[index])
    prompt = np.concatenate([*pieces, context.tokens[done:], question])
    return NeedleSample(needles[0], prompt, position)


def training_documents(
    haystack: Haystack,
    *,
    length: int,
    num_documents: int,
    num_keys: int,
    num_digits: int,
    seed: int,
) -> Iterator[str]:
    """Documents that teach the task: text with needles in it, then a question on each, answered.

    Keys, numbers and text are drawn anew for each document, so the only way to answer is to look.
    Evaluate on other text.

    Args:
        haystack: text to hide needles in.
        length: tokens of a document at most, start and end token and answers included: with
            ``data.seq_len`` of the training run at least this, no question loses its needle.
        num_documents: documents.
        num_keys: needles, and questions, per document.
        num_digits: digits of each number.
        seed: two calls with the same seed yield the same documents.

    Yields:
        Texts, to be written one per line as ``{"text": ...}`` and read by ``nsa train``.

    Raises:
        ValueError: the length leaves no room for text, or the haystack is shorter than that.

    Example:
        >>> documents = training_documents(haystack, length=4096, num_documents=1, num_keys=4,
        ...                                num_digits=7, seed=0)
        >>> next(documents)[-25:]
        'amber anchor is 5210937.'
    """
    for index in range(num_documents):
        rng = random.Random(f"{seed} training {index}")
        needles = make_needles(num_keys, num_digits, rng)
        questions = [n.question + n.answer for n in rng.sample(needles, num_keys)]
        added = encode(haystack.tokenizer, [*(n.sentence for n in needles), *questions])
        room = _room(length, [np.zeros(2), *added])
        # The last sentence is left out: it may be longer than its part of the tokens.
        hay = list(haystack.cut(room, rng).sentences[:-1])
        for needle in needles:
            hay.insert(rng.randrange(len(hay) + 1), needle.sentence)
        yield "".join([*hay, *questions])


def _room(length: int, pieces: Sequence[np.ndarray]) -> int:
    taken = sum(len(piece) for piece in pieces)
    if length <= taken:
        raise ValueError(
            f"length: expected more than {taken} tokens, what needles and questions take alone, "
            f"got {length}. Use longer texts, fewer needles or fewer digits."
        )
    return length - taken


def make_needles(num_keys: int, num_digits: int, rng: random.Random) -> list[Needle]:
    """Needles with different keys and different numbers.

    Args:
        num_keys: how many, at most ``len(KEYS)``.
        num_digits: digits of each number, the first not 0.
        rng: chooses them.

    Raises:
        ValueError: more needles than keys or numbers, or none.
    """
    if not 1 <= num_digits <= MAX_NUM_DIGITS:
        raise ValueError(f"num_digits: expected 1 to {MAX_NUM_DIGITS}, got {num_digits}.")
    least = 10 ** (num_digits - 1)
    most_keys = min(len(KEYS), 9 * least)
    if not 1 <= num_keys <= most_keys:
        raise ValueError(
            f"num_keys: expected 1 to {most_keys} needles of {num_digits} digits, got {num_keys}."
        )
    keys = rng.sample(KEYS, num_keys)
    values = rng.sample(range(least, 10 * least), num_keys)
    return [Needle(key, str(value)) for key, value in zip(keys, values, strict=True)]
