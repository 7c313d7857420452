from __future__ import annotations

import json
from pathlib import Path

from nsa.demo import DemoSettings
from nsa.demo.settings import passages, read_book, write_data


def test_the_book_is_whole_and_its_end_is_held_out():
    trained, held_out = read_book()
    assert trained.startswith("Moby-Dick\n\nby Herman Melville")
    assert held_out.startswith("CHAPTER 133.")
    assert held_out.endswith("only found another orphan.\n")
    assert len((trained + held_out).encode()) == 1_192_723
    assert 0.05 < len(held_out) / len(trained) < 0.06


def test_the_source_of_the_book_is_written_beside_it():
    note = Path("src/nsa/demo/book/SOURCE.md").read_text(encoding="utf-8")
    for fact in ("Herman Melville", "1851", "public domain", "944882722e9a96fa6cf2739dc2ea757e"):
        assert fact in note


def test_twins_differ_in_attention_and_in_where_they_are():
    configs = [DemoSettings().train_config(name, Path("d")).to_dict() for name in ("nsa", "dense")]
    different = {
        f"{section}.{key}"
        for section, values in configs[0].items()
        for key in values
        if values[key] != configs[1][section][key]
    }
    assert different == {
        "model.attention",
        "tokenizer.load",
        "tokenizer.vocab_size",
        "training.output_dir",
    }
    assert configs[1]["tokenizer"]["load"] == str(Path("d/nsa/tokenizer"))


def test_passages_lose_nothing_and_fill_a_sequence():
    _, held_out = read_book()
    found = passages(held_out, 512)
    assert "\n\n".join(found).split() == held_out.split()
    assert all(len(passage) >= 1536 for passage in found[:-1])


def test_data_is_written_once(tmp_path):
    settings = DemoSettings(train_chars=1000)
    write_data(tmp_path, settings)
    train = tmp_path / "data" / "train.txt"
    assert train.read_text(encoding="utf-8") == read_book()[0][:1000]
    lines = (tmp_path / "data" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == passages(read_book()[1], 512)
    before = train.stat().st_mtime_ns
    write_data(tmp_path, settings)
    assert train.stat().st_mtime_ns == before
