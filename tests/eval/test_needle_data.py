from __future__ import annotations

from pathlib import Path

import pytest
from tests.disk import full_disk
from tests.eval.samples import haystack, prose, tokenizer

from nsa.eval.needle_data import read_haystack, write_documents
from nsa.train.documents import find_files, read_documents


def test_written_documents_are_read_by_training(tmp_path: Path):
    path = tmp_path / "data" / "needles.jsonl"
    write_documents(path, ["one\n\ntwo", "dr\u00e9i \u2028"], num_documents=2)
    assert [d.text for d in read_documents(find_files([path]))] == [
        "one\n\ntwo",
        "dr\u00e9i \u2028",
    ]
    assert [p.name for p in path.parent.iterdir()] == ["needles.jsonl"]


def test_an_interruption_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "needles.jsonl"
    path.write_text("old")

    def interrupted():
        yield "one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_documents(path, interrupted(), num_documents=2)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["needles.jsonl"]


def test_a_full_disk_names_the_file(tmp_path: Path):
    path = tmp_path / "needles.jsonl"
    with pytest.raises(OSError, match=r"too large: '.*needles\.jsonl'"), full_disk():
        write_documents(path, ["one" * 99], num_documents=1)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_training_would_not_read(tmp_path: Path):
    with pytest.raises(ValueError, match=r"--output: expected a name that ends in \.jsonl, got"):
        write_documents(tmp_path / "needles.json", [], num_documents=0)


def test_haystack_from_files_and_a_saved_tokenizer(tmp_path: Path):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    for seed in (1, 2):
        (tmp_path / f"{seed}.txt").write_text(prose(300, seed))
    paths = [tmp_path / "1.txt", tmp_path / "2.txt"]
    made = read_haystack(paths, tmp_path / "tokenizer", name="--haystack")
    assert made.tokens.tolist() == haystack().tokens.tolist()
    with pytest.raises(FileNotFoundError, match="--haystack: no such file or folder"):
        read_haystack([tmp_path / "3.txt"], tmp_path / "tokenizer", name="--haystack")
