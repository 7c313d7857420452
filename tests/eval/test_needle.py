from __future__ import annotations

import random

import pytest
from tests.eval.samples import haystack, tokenizer

from nsa.eval.needle import KEYS, Needle, make_needles, needle_sample, training_documents

NEEDLE = Needle("calm otter", "1234")


def sample(seed: int = 0, **changes: float):
    settings = {"length": 400, "depth": 0.5, "num_keys": 1, "num_digits": 5, **changes}
    return needle_sample(haystack(), rng=random.Random(seed), **settings)


@pytest.mark.parametrize("num_keys", [1, 4], ids=["single", "multi"])
@pytest.mark.parametrize("length", [300, 401], ids=["short", "odd"])
def test_prompt_has_the_exact_length_all_needles_and_the_question_last(length: int, num_keys: int):
    made = sample(length=length, num_keys=num_keys)
    text = tokenizer().decode(made.prompt)
    assert len(made.prompt) == length
    assert made.prompt[0] == tokenizer().bos_token_id
    assert text.count(made.needle.sentence) == 1
    assert text.count("The special magic number for the ") == num_keys + 1
    assert text.endswith(made.needle.question)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_needle_stands_at_its_depth_between_sentences(depth: float):
    for seed in range(10):
        made = sample(seed, depth=depth, length=1000)
        before = tokenizer().decode(made.prompt[1 : made.position])
        after = tokenizer().decode(made.prompt[made.position :])
        assert after.startswith(made.needle.sentence)
        assert depth == 1.0 or not before or before[-1] in ".!?"
        added = tokenizer()(made.needle.sentence + made.needle.question, add_special_tokens=False)[
            "input_ids"
        ]
        # Moved to the nearest start of a sentence, so by half a sentence at most.
        assert abs(made.position - 1 - depth * (999 - len(added))) < 40


def test_seed_decides_everything():
    first, again, other = sample(1), sample(1), sample(2)
    assert first.needle == again.needle
    assert first.prompt.tolist() == again.prompt.tolist()
    assert first.prompt.tolist() != other.prompt.tolist()


def test_no_room_for_text():
    with pytest.raises(ValueError, match=r"length: expected more than \d+ tokens, .* got 40\."):
        sample(length=40)


@pytest.mark.parametrize(
    ("continuation", "found"),
    [
        (" 1234.", True),
        ("1234", True),
        ("\n1234 and more", True),
        (" 12345.", False),
        (" 123.", False),
        (" is 1234.", False),
        ("", False),
    ],
    ids=["as-taught", "no-space", "line", "too-long", "too-short", "late", "nothing"],
)
def test_only_exactly_the_number_counts(continuation: str, found: bool):
    assert NEEDLE.found_in(continuation) is found


def test_answer_to_its_own_question_is_found():
    assert NEEDLE.found_in(NEEDLE.answer)


def test_needles_differ():
    needles = make_needles(9, 1, random.Random(0))
    assert len({n.key for n in needles}) == 9
    assert sorted(n.value for n in needles) == list("123456789")
    assert len(set(KEYS)) == len(KEYS)


@pytest.mark.parametrize(
    ("num_keys", "num_digits", "message"),
    [
        (0, 5, r"num_keys: expected 1 to \d+ needles of 5 digits, got 0"),
        (10, 1, "num_keys: expected 1 to 9 needles of 1 digits, got 10"),
        (1, 0, "num_digits: expected 1 to 18, got 0"),
        (1, 19, "num_digits: expected 1 to 18, got 19"),
    ],
    ids=["none", "more-than-numbers", "no-digits", "many-digits"],
)
def test_impossible_needles(num_keys: int, num_digits: int, message: str):
    with pytest.raises(ValueError, match=message):
        make_needles(num_keys, num_digits, random.Random(0))


def documents(**changes: int) -> list[str]:
    settings = {"length": 500, "num_documents": 5, "num_keys": 3, "num_digits": 5, "seed": 0}
    return list(training_documents(haystack(), **{**settings, **changes}))


def test_training_documents_ask_for_every_needle_after_the_text():
    for text in documents():
        hay, *questions = text.split("\n\nWhat is the special magic number for the ")
        assert len(questions) == 3
        for question in questions:
            key = question.split("?")[0]
            answer = question.split(" is ")[1]
            assert hay.count(f" The special magic number for the {key} is {answer}") == 1


def test_training_documents_fit_their_length():
    sizes = [
        len(tokenizer()(text, add_special_tokens=False)["input_ids"]) + 2
        for text in documents(num_documents=20)
    ]
    assert max(sizes) <= 500
    assert min(sizes) > 430


def test_training_documents_follow_their_seed():
    assert documents() == documents()
    assert documents(num_documents=2) == documents()[:2]
    assert not set(documents(seed=1)) & set(documents())


def test_training_documents_need_room():
    with pytest.raises(ValueError, match="length: expected more than"):
        documents(length=100)
