from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tests.browser import Browser, browser  # noqa: F401
from tests.inspect.test_tracing import make_model
from transformers import PreTrainedTokenizerFast

from nsa import cli
from nsa.inspect import inspect_text, tokenize
from nsa.train.tokenizer import END_OF_TEXT, train_tokenizer

TEXT = "Call me Ishmael. «Là-bas», 漢字 and 🐳!\n\n" * 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Call me Ishmael. "] * 20, vocab_size=280)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for attention in ("nsa", "dense"):
        make_model(attention, vocab_size=len(tokenizer)).save_pretrained(root / attention)
        tokenizer.save_pretrained(root / attention)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return {"root": root, "nsa": root / "nsa", "dense": root / "dense", "text": root / "text.txt"}


def test_pieces_joined_are_the_text(tokenizer):
    ids, pieces = tokenize(tokenizer, TEXT, 10_000)
    assert len(ids) == len(pieces)
    assert pieces[0] == END_OF_TEXT
    assert "".join(pieces[1:]) == TEXT
    assert ids[1:] == tokenizer(TEXT, add_special_tokens=False)["input_ids"]


def test_a_character_of_several_tokens_is_shown_once(tokenizer):
    ids, pieces = tokenize(tokenizer, "a漢b", 100)
    assert len(ids) == 6
    assert pieces[1:] == ["a", "", "", "漢", "b"]


def test_no_more_tokens_than_asked_for(tokenizer):
    ids, pieces = tokenize(tokenizer, TEXT, 10)
    assert len(ids) == len(pieces) == 10
    assert TEXT.startswith("".join(pieces[1:]))


def test_page_of_a_saved_model(folders, browser, monkeypatch, capsys):  # noqa: F811
    output = folders["root"] / "page.html"
    arguments = {"model": folders["nsa"], "text": folders["text"], "output": output}
    command = [f"--{name}={value}" for name, value in arguments.items()]
    monkeypatch.setattr(
        sys, "argv", ["nsa", "inspect", *command, f"--twin={folders['dense']}", "--layer=1"]
    )
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 0
    assert "Read 256 tokens" in capsys.readouterr().out  # the model has no more positions
    browser.open(output)
    assert browser.wait("document.querySelector('[data-inspector]').dataset.ready")[0] == "1"
    assert browser.log() == []
    assert "of the dense twin" in browser.find("[data-part=recall-note]").text
    shown = browser.js("return document.querySelector('[data-part=text]').textContent")
    assert (END_OF_TEXT + TEXT).startswith(shown)
    assert len(shown) > 100


def test_no_file_is_left_by_a_failure(folders, tmp_path):
    with pytest.raises(ValueError, match="layers: expected numbers from 0 to 1, got 7"):
        inspect_text(folders["nsa"], folders["text"], tmp_path / "p.html", device=CPU, layers=[7])
    assert list(tmp_path.iterdir()) == []


def test_a_twin_of_another_vocabulary_is_named(folders, tokenizer, tmp_path):
    make_model("dense", vocab_size=300).save_pretrained(tmp_path / "twin")
    tokenizer.save_pretrained(tmp_path / "twin")
    with pytest.raises(ValueError, match=r"twin: expected .* of 270 tokens, got 300"):
        inspect_text(
            folders["nsa"], folders["text"], tmp_path / "p.html", device=CPU, twin=tmp_path / "twin"
        )


def test_empty_text_is_named(folders, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty\.txt: expected some text, found none"):
        inspect_text(folders["nsa"], empty, tmp_path / "p.html", device=CPU)
