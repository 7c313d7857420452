from __future__ import annotations

import random

import numpy as np
import pytest
from tests.eval.samples import haystack, prose, tokenizer

from nsa.eval.haystack import Haystack


def test_sentences_keep_every_character_and_token():
    texts = [prose(20, 1), " One line.\n\nAnother? Yes! No end "]
    made = Haystack.from_texts([texts[0], "  \n", texts[1]], tokenizer())
    whole = f"\n\n{texts[0]}\n\n{texts[1].strip()}"
    assert "".join(made.sentences) == whole
    assert made.tokens.tolist() == tokenizer()(whole, add_special_tokens=False)["input_ids"]
    assert made.sentences[-4:] == ("\n\nOne line.", "\n\nAnother?", " Yes!", " No end")


def test_starts_point_at_sentences():
    made = haystack()
    for index in (0, 7, len(made.sentences) - 1):
        past = [*made.starts, len(made.tokens)][index + 1]
        assert tokenizer().decode(made.tokens[made.starts[index] : past]) == made.sentences[index]


@pytest.mark.parametrize("num_tokens", [1, 37, 500], ids=["one", "odd", "long"])
def test_cut_has_the_exact_length_and_begins_with_a_sentence(num_tokens: int):
    made = haystack()
    for seed in range(20):
        context = made.cut(num_tokens, random.Random(seed))
        text = "".join(context.sentences)
        assert len(context.tokens) == num_tokens
        assert text.startswith(tokenizer().decode(context.tokens))
        assert context.boundaries[0] == 0
        assert context.boundaries[-1] == num_tokens
        assert (np.diff(context.boundaries) > 0).all()


def test_cut_can_take_everything_but_not_more():
    made = haystack()
    whole = made.cut(len(made.tokens), random.Random(0))
    assert whole.sentences == made.sentences
    with pytest.raises(ValueError, match=f"at least {len(made.tokens) + 1} tokens of text, got"):
        made.cut(len(made.tokens) + 1, random.Random(0))


def test_no_text():
    with pytest.raises(ValueError, match="haystack: expected text to hide needles in, got none"):
        Haystack.from_texts(["", " \n"], tokenizer())
