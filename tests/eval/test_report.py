from __future__ import annotations

import io
import json
import math
from pathlib import Path

from rich.console import Console
from tests.eval.test_needle_plot import CELLS

from nsa.eval import report
from nsa.eval.task_suites import TaskScore
from nsa.train.validation import PositionLosses

LOSSES = PositionLosses(
    loss=2.0,
    num_tokens=30,
    num_documents=2,
    bin_edges=(1, 64, 128, 256),
    bin_losses=(2.5, 1.5, math.nan),
    bin_tokens=(20, 10, 0),
)


def score(task: str, value: float, **changes: object) -> TaskScore:
    fields = {
        "group": None,
        "metric": "acc",
        "stderr": 0.025,
        "num_items": 1234,
        "num_fewshot": 5,
        "source": "hub",
    }
    return TaskScore(task=task, value=value, **{**fields, **changes})  # type: ignore[arg-type]


SCORES = [
    score("mmlu", 0.3125, num_fewshot=None),
    score("mmlu_anatomy", 0.7, group="mmlu"),
    score("gsm8k", 0.125, metric="exact_match,strict-match", stderr=None, source="a/gsm8k.jsonl"),
]


def shown(*tables: object) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(*tables)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def row(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.strip("│ ").startswith(f"{name} ")]
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_perplexity_table_has_a_row_per_bin_with_tokens():
    lines = shown(report.perplexity_table(LOSSES))
    assert "2 documents" in lines[0]
    assert row(lines, "1 to 63") == ["1 to 63", "20", "2.500", "12.18"]
    assert row(lines, "64 to 127") == ["64 to 127", "10", "1.500", "4.482"]
    assert row(lines, "all") == ["all", "30", "2.000", "7.389"]
    assert not any("128 to 255" in line for line in lines)


def test_needle_tables_have_depths_down_and_lengths_across():
    single, multi = report.needle_tables(CELLS)
    lines = shown(single)
    assert "1 needle" in lines[0]
    assert any("1024 tokens" in line and "2048 tokens" in line for line in lines)
    assert row(lines, "0%") == ["0%", "50%  -1.0", "0%  -1.0"]
    assert row(lines, "100%") == ["100%", "100%  -1.0", "50%  -1.0"]
    assert "1 of 4 needles" in shown(multi)[0]


def test_tasks_table_shows_groups_without_their_members():
    lines = shown(report.tasks_table(SCORES))
    assert row(lines, "mmlu") == ["mmlu", "acc", "0.3125", "0.025", "1,234", "5"]
    assert row(lines, "gsm8k") == ["gsm8k", "exact_match, strict-match", "0.125", "", "1,234", "5"]
    assert not any("anatomy" in line for line in lines)


def test_file_holds_everything_as_plain_json(tmp_path: Path):
    path = tmp_path / "new" / "results.json"
    report.save(
        path,
        {
            "perplexity": report.perplexity_json(LOSSES),
            "needle": report.needle_json(CELLS),
            "tasks": report.tasks_json(SCORES),
            "settings": {"text": (Path("a/b"),), "limit": None},
        },
    )
    got = json.loads(path.read_text())
    assert got["perplexity"]["bins"] == [
        {"first": 1, "past": 64, "loss": 2.5, "num_tokens": 20},
        {"first": 64, "past": 128, "loss": 1.5, "num_tokens": 10},
        {"first": 128, "past": 256, "loss": None, "num_tokens": 0},
    ]
    assert [c["accuracy"] for c in got["needle"][:3]] == [0.5, 1.0, 1.0]
    assert got["needle"][0]["answers"][0]["correct"] is False
    assert [s["task"] for s in got["tasks"]] == ["mmlu", "mmlu_anatomy", "gsm8k"]
    assert got["settings"] == {"text": ["a/b"], "limit": None}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
