"""The token store: what was read, once, until something changes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from tests.disk import cut_to_half, full_disk

from nsa.train import corpus as module
from nsa.train.corpus import build_corpus
from nsa.train.tokenizer import encode_documents, train_tokenizer

TEXTS = ["one fish two fish", "red fish", "blue fish " * 30]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=270)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return path


@pytest.mark.parametrize("batch_chars", [1, 20, 10**6], ids=["each", "some", "all"])
def test_documents_come_back_whole(
    batch_chars: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH_CHARS", batch_chars)
    counts: list[int] = []
    corpus = build_corpus([source], TOKENIZER, tmp_path, name="train", on_tokens=counts.append)
    wanted = list(encode_documents(TOKENIZER, TEXTS))
    assert corpus.num_documents == 3
    assert [corpus.document(i).tolist() for i in range(3)] == wanted
    assert corpus.num_tokens == sum(map(len, wanted)) == counts[-1]


def test_store_is_reused_until_a_file_or_the_tokenizer_changes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_corpus([source], TOKENIZER, tmp_path, name="train")
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_documents", None)
        assert build_corpus([source], TOKENIZER, tmp_path, name="train").digest == first.digest

    os.utime(source, ns=(1, 1))
    assert build_corpus([source], TOKENIZER, tmp_path, name="train").digest == first.digest
    source.write_text(json.dumps({"text": "fish fish"}))
    second = build_corpus([source], TOKENIZER, tmp_path, name="train")
    assert second.digest != first.digest
    assert second.num_documents == 1
    smaller = train_tokenizer(TEXTS, vocab_size=258)
    third = build_corpus([source], smaller, tmp_path, name="train")
    assert third.num_tokens > second.num_tokens


@pytest.mark.parametrize("name", ["meta.json", "tokens.bin", "offsets.npy"])
def test_store_that_is_not_whole_is_made_anew(name: str, source: Path, tmp_path: Path) -> None:
    first = build_corpus([source], TOKENIZER, tmp_path, name="train")
    whole = (tmp_path / "train" / name).read_bytes()
    for harm in (cut_to_half, Path.unlink, lambda path: path.write_bytes(b"")):
        harm(tmp_path / "train" / name)
        assert build_corpus([source], TOKENIZER, tmp_path, name="train").digest == first.digest
        assert (tmp_path / "train" / name).read_bytes() == whole


def test_interrupted_encoding_leaves_no_store(source: Path, tmp_path: Path) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_corpus([source], TOKENIZER, tmp_path / "tokens", name="train", on_tokens=stop)
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.parametrize(
    ("texts", "name"), [([TEXTS[2]] * 9, "tokens.bin"), (["a"] * 20, "offsets.npy")]
)
def test_full_disk_names_the_file(texts: list[str], name: str, tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(OSError, match=re.escape(name)), full_disk(250):
        build_corpus([source], TOKENIZER, tmp_path / "tokens", name="train")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_empty_corpus_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "blank.txt"
    path.write_text("  \n")
    with pytest.raises(ValueError, match=r"data\.train: expected at least one document with text"):
        build_corpus([path], TOKENIZER, tmp_path, name="train")


def test_same_split_of_tokens_matters_to_the_digest(tmp_path: Path) -> None:
    digests = set()
    for name, texts in {"joined": ["aa"], "apart": ["a", "a"]}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        corpus = build_corpus([path], TOKENIZER, tmp_path, name=name)
        assert corpus.tokens.dtype == np.uint32
        digests.add(corpus.digest)
    assert len(digests) == 2
