"""Byte-level BPE: lossless, repeatable, closed documents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.disk import cut_to_half
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nsa.models import loading
from nsa.train import tokenizer as module
from nsa.train.tokenizer import (
    END_OF_TEXT,
    encode_documents,
    load_tokenizer,
    start_tokens,
    train_tokenizer,
    with_start_token,
)

TEXTS = ["to be or not to be, that is the question"] * 20 + ["whether 'tis nobler in the mind"]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=290)


@given(st.text(max_size=60))
def test_any_text_decodes_to_itself(text: str) -> None:
    (ids,) = encode_documents(TOKENIZER, [text])
    assert TOKENIZER.decode(ids[1:-1]) == text
    end = TOKENIZER.eos_token_id
    assert ids[0] == ids[-1] == end
    assert end not in ids[1:-1]


def test_text_that_spells_the_end_token_does_not_close_its_document() -> None:
    (ids,) = encode_documents(TOKENIZER, [f"a{END_OF_TEXT}b"])
    assert TOKENIZER.eos_token_id not in ids[1:-1]
    assert TOKENIZER.decode(ids[1:-1]) == f"a{END_OF_TEXT}b"


def test_training_twice_gives_the_same_tokenizer_and_merges_what_is_frequent() -> None:
    again = train_tokenizer(TEXTS, vocab_size=290)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert len(TOKENIZER) == 290
    (ids,) = encode_documents(TOKENIZER, [TEXTS[0]])
    assert len(ids) < len(TEXTS[0]) * 0.6


def test_reading_stops_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAIN_TEXT_CHARS", 100)
    read: list[str] = []
    texts = (read.append(text) or text for text in TEXTS)
    train_tokenizer(texts, vocab_size=260)
    assert len(read) == 3


def test_saved_and_loaded(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert list(encode_documents(loaded, TEXTS)) == list(encode_documents(TOKENIZER, TEXTS))
    assert loaded.pad_token_id == TOKENIZER.pad_token_id != loaded.eos_token_id


def test_the_tokenizer_of_a_model_is_loaded_in_silence(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "native_sparse_attention"}')
    script = "import sys, nsa.train.tokenizer; nsa.train.tokenizer.load_tokenizer(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def without_template(**names: str) -> PreTrainedTokenizerFast:
    """As tokenizers of the kind of GPT-2 are: they have a start token and do not add it."""
    raw = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    raw.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END_OF_TEXT, **names)


def test_a_text_begins_with_the_start_token_once_and_a_document_too() -> None:
    start = TOKENIZER.bos_token_id
    bare = TOKENIZER("to be", add_special_tokens=False)["input_ids"]
    assert TOKENIZER("to be")["input_ids"] == [start, *bare]
    assert TOKENIZER("to be", "to be")["input_ids"] == [start, *bare, *bare]
    (ids,) = encode_documents(TOKENIZER, ["to be"])
    assert ids == [start, *bare, TOKENIZER.eos_token_id]
    assert TOKENIZER.decode([start, *bare], skip_special_tokens=True) == "to be"


def test_the_start_token_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded("to be")["input_ids"] == TOKENIZER("to be")["input_ids"]


def test_a_loaded_tokenizer_is_made_to_begin_texts(tmp_path: Path) -> None:
    plain = without_template(bos_token=END_OF_TEXT)
    assert start_tokens(plain) == []
    bare = plain("to be")["input_ids"]
    plain.save_pretrained(tmp_path / "plain")
    starting = load_tokenizer(tmp_path / "plain")
    start = starting.bos_token_id
    assert starting("to be")["input_ids"] == [start, *bare]
    assert list(encode_documents(starting, ["to be"])) == [[start, *bare, start]]
    assert with_start_token(starting) is starting
    assert plain("to be")["input_ids"] == bare
    starting.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again")("to be")["input_ids"] == [start, *bare]


def test_a_tokenizer_without_start_token_stays() -> None:
    plain = without_template()
    assert with_start_token(plain) is plain
    assert list(encode_documents(plain, ["to be"])) == [
        [*plain("to be")["input_ids"], plain.eos_token_id]
    ]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"tokenizer\.vocab_size: expected at least 258 .* got 257"
    ):
        train_tokenizer(TEXTS, vocab_size=257)
    with pytest.raises(ValueError, match=r"expected text to train on, got none"):
        train_tokenizer([], vocab_size=300)
    with pytest.raises(ValueError, match=r"expected a folder with tokenizer\.json"):
        load_tokenizer(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected an end-of-text token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_cut_to_half_its_size(name: str, tmp_path: Path) -> None:
    train_tokenizer(["a fish"], vocab_size=270).save_pretrained(tmp_path)
    cut_to_half(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: expected JSON, .* cut short"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("load", [load_tokenizer, loading.load_tokenizer], ids=["train", "model"])
def test_tokenizer_that_tokenizers_cannot_read(load: Any, tmp_path: Path) -> None:
    train_tokenizer(["a fish"], vocab_size=270).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer: expected a folder with .*cannot be read"):
        load(tmp_path)
    cut_to_half(tmp_path / "tokenizer_config.json")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected JSON, .* cut short"):
        load(tmp_path)
