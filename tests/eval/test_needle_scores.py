from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from tests.eval.samples import Retriever, haystack, llama, tokenizer

from nsa.eval.needle import needle_sample
from nsa.eval.needle_scores import (
    answer_room,
    answer_samples,
    check_grid,
    needle_cells,
    num_samples,
)
from nsa.eval.settings import NeedleSettings
from nsa.models import NSAForCausalLM, NSAModelConfig

SETTINGS = NeedleSettings(depths=(0, 50, 100), num_keys=(1, 3), num_digits=5, num_samples=2)


def cells(model, settings: NeedleSettings = SETTINGS, seed: int = 0, **options):
    lengths = options.pop("lengths", (320,))
    return list(needle_cells(model, haystack(), settings, lengths=lengths, seed=seed, **options))


def test_a_model_that_looks_back_finds_every_needle():
    for cell in cells(Retriever()):
        assert cell.accuracy == 1.0
        assert cell.log_likelihood > -0.1
        for answer in cell.answers:
            assert answer.continuation.startswith(f" {answer.value}")


def test_a_model_that_learned_nothing_finds_none():
    for cell in cells(llama()):
        assert cell.accuracy == 0.0
        assert cell.log_likelihood < -10


def test_a_model_with_a_short_memory_finds_the_near_ones():
    found = {(c.num_keys, c.depth): c.accuracy for c in cells(Retriever(memory=120))}
    assert found == {(n, d): float(d == 100) for n in (1, 3) for d in (0, 50, 100)}


def test_batches_change_nothing():
    one = cells(llama())
    two = cells(llama(), dataclasses.replace(SETTINGS, batch_size=2))
    for cell, other in zip(one, two, strict=True):
        assert [a.continuation for a in cell.answers] == [a.continuation for a in other.answers]
        assert cell.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)


def test_log_likelihood_is_that_of_the_answers_tokens():
    model = llama()
    made = needle_sample(
        haystack(), length=300, depth=0.5, num_keys=1, num_digits=5, rng=random.Random(0)
    )
    answer = tokenizer()(made.needle.answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*made.prompt.tolist(), *answer]])
    with torch.no_grad():
        logp = model(ids).logits[0].log_softmax(-1)
    expected = sum(float(logp[299 + i, token]) for i, token in enumerate(answer))
    (got,) = answer_samples(model, haystack(), [made])
    assert got.log_likelihood == pytest.approx(expected, rel=1e-5)


def test_a_sparse_model_generates_what_its_likelihood_says():
    torch.manual_seed(0)
    config = NSAModelConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        compress_block_size=16,
        compress_stride=8,
        block_size=16,
        num_selected_blocks=4,
        window_size=32,
    )
    for cell in cells(NSAForCausalLM(config).eval()):
        assert cell.accuracy == 0.0
        assert -200 < cell.log_likelihood < -10


def test_samples_depend_on_seed_and_cell_only():
    def asked(**options):
        return {
            (c.num_keys, c.length, c.depth): [(a.key, a.value, a.position) for a in c.answers]
            for c in cells(llama(), **options)
        }

    small = asked(settings=dataclasses.replace(SETTINGS, depths=(50,), num_samples=1))
    large = asked(lengths=(320, 400))
    assert all(large[place][:1] == answers for place, answers in small.items())
    assert asked(seed=1) != asked(seed=0)
    every = [answer for answers in large.values() for answer in answers]
    assert len(set(every)) == len(every)


def test_progress_ends_at_the_total():
    seen: list[int] = []
    cells(llama(), on_samples=seen.append)
    assert seen == list(range(1, num_samples(SETTINGS, (320,)) + 1))


def test_prompt_and_any_answer_fit_the_length():
    for digits in (1, 5, 18):
        answer = f" {'9' * digits}."
        assert len(tokenizer()(answer, add_special_tokens=False)["input_ids"]) <= answer_room(
            digits
        )


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((60, 320), "length: expected more than .* got 52"),
        ((320, 10**6), "haystack: expected at least .* tokens of text"),
    ],
    ids=["too-short", "too-long"],
)
def test_grid_that_cannot_be_built(lengths: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        check_grid(haystack(), SETTINGS, lengths)
