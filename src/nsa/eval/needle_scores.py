"""Scores of a model on needles: does it write the number, and how likely does it find it.

One grid: number of needles x length x depth. Every sample is asked twice: greedy generation, which
must begin with exactly the hidden number, and the log-likelihood of the right answer, which tells
near misses from blindness.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nsa.eval.haystack import Haystack, encode
from nsa.eval.needle import NeedleSample, needle_sample
from nsa.eval.settings import NeedleSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleAnswer:
    """What a model said to one sample.

    Args:
        key: what was asked for.
        value: the number hidden.
        position: index of the needle's first token in the prompt.
        continuation: what the model wrote, greedily.
        correct: whether it begins with exactly the number.
        log_likelihood: of the right answer given the prompt, nats, summed over its tokens.
    """

    key: str
    value: str
    position: int
    continuation: str
    correct: bool
    log_likelihood: float


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleCell:
    """The answers at one place of the grid.

    Args:
        num_keys: needles in the text.
        length: tokens of prompt and answer.
        depth: place of the needle asked for, percent of the text.
        answers: one per sample.
    """

    num_keys: int
    length: int
    depth: int
    answers: tuple[NeedleAnswer, ...]

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return sum(a.correct for a in self.answers) / len(self.answers)

    @property
    def log_likelihood(self) -> float:
        """Mean log-likelihood of the right answers, nats."""
        return sum(a.log_likelihood for a in self.answers) / len(self.answers)


def needle_cells(
    model: nn.Module,
    haystack: Haystack,
    settings: NeedleSettings,
    *,
    lengths: Sequence[int],
    seed: int,
    on_samples: Callable[[int], None] | None = None,
) -> Iterator[NeedleCell]:
    """Asks a model through the whole grid, one cell at a time.

    A sample depends on ``seed`` and its own cell only: a larger grid contains a smaller one.

    Args:
        model: a causal language model of transformers (``generate``, and a forward pass that takes
            ``logits_to_keep``), in evaluation mode.
        haystack: text to hide needles in.
        settings: the grid.
        lengths: tokens of prompt and answer, so at most the model's positions.
        seed: of text, keys, numbers and places.
        on_samples: called with the number of samples answered so far, for a progress bar.

    Yields:
        Cells, by number of keys, then length, then depth.

    Raises:
        ValueError: a length leaves no room for text, or exceeds the haystack.

    Example:
        >>> for cell in needle_cells(model, haystack, settings, lengths=[4096], seed=0):
        ...     print(cell.depth, cell.accuracy)
    """
    done = 0
    for num_keys in settings.num_keys:
        for length in lengths:
            for depth in settings.depths:
                samples = [
                    _sample(haystack, settings, (num_keys, length, depth), f"{seed} {index}")
                    for index in range(settings.num_samples)
                ]
                answers: list[NeedleAnswer] = []
                for first in range(0, len(samples), settings.batch_size):
                    batch = samples[first : first + settings.batch_size]
                    answers += answer_samples(model, haystack, batch)
                    done += len(batch)
                    if on_samples is not None:
                        on_samples(done)
                yield NeedleCell(
                    num_keys=num_keys, length=length, depth=depth, answers=tuple(answers)
                )


def check_grid(haystack: Haystack, settings: NeedleSettings, lengths: Sequence[int]) -> None:
    """Tries the shortest and the longest text with the most needles.

    Raises:
        ValueError: there is no room for text in the one, or not enough text for the other.
    """
    for length in (min(lengths), max(lengths)):
        _sample(haystack, settings, (max(settings.num_keys), length, 0), "check")


def num_samples(settings: NeedleSettings, lengths: Sequence[int]) -> int:
    """Samples in the whole grid."""
    cells = len(settings.num_keys) * len(lengths) * len(settings.depths)
    return cells * settings.num_samples


@torch.no_grad()
def answer_samples(
    model: nn.Module, haystack: Haystack, samples: Sequence[NeedleSample]
) -> list[NeedleAnswer]:
    """Asks a model some samples whose prompts have one length.

    Args:
        model: see :func:`needle_cells`.
        haystack: the one the samples are from; its tokenizer is the model's.
        samples: prompts, all of the same number of tokens.

    Returns:
        Answers in the order of the samples.
    """
    tokenizer = haystack.tokenizer
    device = next(model.parameters()).device
    prompts = torch.from_numpy(np.stack([s.prompt for s in samples])).to(device)
    wanted = encode(tokenizer, [s.needle.answer for s in samples])
    pad = tokenizer.pad_token_id
    written = model.generate(  # pyright: ignore[reportCallIssue]
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=max(len(ids) for ids in wanted),
        do_sample=False,
        pad_token_id=pad if isinstance(pad, int) else 0,
    )
    texts = tokenizer.batch_decode(written[:, prompts.shape[1] :], skip_special_tokens=True)
    likelihoods = _log_likelihoods(model, prompts, wanted).tolist()
    return [
        NeedleAnswer(
            key=sample.needle.key,
            value=sample.needle.value,
            position=sample.position,
            continuation=text,
            correct=sample.needle.found_in(text),
            log_likelihood=likelihood,
        )
        for sample, text, likelihood in zip(samples, texts, likelihoods, strict=True)
    ]


def _sample(
    haystack: Haystack, settings: NeedleSettings, cell: tuple[int, int, int], place: str
) -> NeedleSample:
    num_keys, length, depth = cell
    return needle_sample(
        haystack,
        length=length - answer_room(settings.num_digits),
        depth=depth / 100,
        num_keys=num_keys,
        num_digits=settings.num_digits,
        rng=random.Random(f"{place} {num_keys} {length} {depth}"),
    )


def answer_room(num_digits: int) -> int:
    """Tokens kept free behind every prompt for the answer ``" 1234567."``.

    How many it takes depends on the number, but the prompts of a batch must have one length: a
    token for each character, and one for the start-of-word mark that some tokenizers add.
    """
    return num_digits + 3


def _log_likelihoods(model: nn.Module, prompts: Tensor, answers: Sequence[np.ndarray]) -> Tensor:
    """float32 ``[batch]``: sum over each answer of log p(token | prompt, answer so far)."""
    targets = nn.utils.rnn.pad_sequence(
        [torch.from_numpy(ids) for ids in answers], batch_first=True, padding_value=-100
    ).to(prompts.device)
    # Right padding: no real token can see it.
    inputs = torch.cat([prompts, targets.clamp_min(0)], dim=1)
    logits = model(inputs, use_cache=False, logits_to_keep=targets.shape[1] + 1).logits[:, :-1]
    losses = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    return -losses.sum(dim=1)
