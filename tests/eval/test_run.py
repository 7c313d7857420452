from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.eval.samples import llama, prose, tokenizer
from tests.eval.task_files import write_task_files
from typer.testing import CliRunner

from nsa.cli import app
from nsa.eval import run as run_module
from nsa.eval.run import Evaluation, default_output, evaluate, needle_lengths
from nsa.eval.settings import EvalSettings, NeedleSettings
from nsa.train.documents import find_files, read_documents

NEEDLE = ["needle.lengths=[250, 300]", "needle.depths=[0, 100]", "needle.num_keys=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a long text and task files."""
    folder = tmp_path_factory.mktemp("eval")
    llama(max_positions=512).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for seed in range(3):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{seed}.txt").write_text(prose(150, seed))
    (folder / "tasks").mkdir()
    write_task_files(folder / "tasks")
    return folder


def measure(folder: Path, output: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=100)
    results = evaluate(
        folder / "model",
        Evaluation(**changes),
        output=output,
        device=torch.device("cpu"),
        console=console,
    )
    return results, console.file.getvalue()  # type: ignore[attr-defined]


def test_everything_at_once(folder: Path, tmp_path: Path):
    settings = EvalSettings.from_overrides([*NEEDLE, "perplexity.max_tokens=100"])
    _, shown = measure(
        folder,
        tmp_path,
        text=(folder / "text",),
        haystack=(folder / "text",),
        tasks=("boolq",),
        task_data=folder / "tasks",
        settings=settings,
        limit=2,
        seed=7,
    )
    got = json.loads((tmp_path / "results.json").read_text())
    assert got["provenance"]["model"]["path"] == str(folder / "model")
    assert got["settings"]["settings"]["needle"]["lengths"] == [250, 300]
    assert got["settings"]["seed"] == 7
    assert got["perplexity"]["num_documents"] == 2
    assert got["perplexity"]["num_tokens"] == 2 * 99
    assert [(c["length"], c["depth"], len(c["answers"])) for c in got["needle"]] == [
        (250, 0, 2),
        (250, 100, 2),
        (300, 0, 2),
        (300, 100, 2),
    ]
    assert [(t["task"], t["num_items"]) for t in got["tasks"]] == [("boolq", 1)]
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "needle.png"}
    for title in ("Perplexity by position, 2 documents", "1 needle", "Tasks", "results.json"):
        assert title in shown


def test_parts_that_were_not_asked_for_are_not_there(folder: Path, tmp_path: Path):
    results, _ = measure(folder, tmp_path, text=(folder / "text",))
    assert set(results) == {"provenance", "settings", "perplexity"}
    assert {p.name for p in tmp_path.iterdir()} == {"results.json"}


def test_an_interruption_keeps_what_was_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def two_cells_then_interrupt(*args: Any, **options: Any):
        cells = run_module_cells(*args, **options)
        yield next(cells)
        yield next(cells)
        raise KeyboardInterrupt

    run_module_cells = run_module.needle_cells
    monkeypatch.setattr(run_module, "needle_cells", two_cells_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(
            folder,
            tmp_path,
            text=(folder / "text",),
            haystack=(folder / "text",),
            settings=EvalSettings.from_overrides(NEEDLE),
            limit=1,
        )
    got = json.loads((tmp_path / "results.json").read_text())
    assert got["perplexity"]["num_documents"] == 1
    assert [cell["depth"] for cell in got["needle"]] == [0, 100]


def test_results_that_are_there_are_kept(folder: Path, tmp_path: Path):
    (tmp_path / "results.json").write_text("measured before")
    message = (
        r"output: expected a folder without results, but .*results\.json exists\. Name another"
    )
    with pytest.raises(ValueError, match=message):
        measure(folder / "not looked for", tmp_path, text=(folder / "nor this",))
    assert (tmp_path / "results.json").read_text() == "measured before"


def test_the_seed_repeats_everything_and_changes_the_needles(folder: Path, tmp_path: Path):
    def needles(run: str, seed: int) -> Any:
        settings = EvalSettings.from_overrides(NEEDLE)
        hay = (folder / "text",)
        results, _ = measure(
            folder, tmp_path / run, haystack=hay, settings=settings, limit=1, seed=seed
        )
        return results["needle"]

    first = needles("first", 0)
    assert first == needles("again", 0)
    assert first != needles("other", 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["needle.lengths=[513]"], "needle.lengths: expected at most 512, the positions of the"),
        (["needle.lengths=[60]"], "length: expected more than"),
        (["perplexity.max_tokens=513"], "perplexity.max_tokens: expected at most 512"),
    ],
    ids=["too-long", "too-short", "perplexity"],
)
def test_settings_that_do_not_fit_the_model(
    folder: Path, tmp_path: Path, overrides: list[str], message: str
):
    with pytest.raises(ValueError, match=message):
        measure(
            folder,
            tmp_path,
            text=(folder / "text",),
            haystack=(folder / "text",),
            settings=EvalSettings.from_overrides(overrides),
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": ("nowhere.txt",)}, FileNotFoundError, "--text: no such file or folder"),
        ({"haystack": ("nowhere.txt",)}, FileNotFoundError, "--haystack: no such file or folder"),
        ({"text": ("empty.txt",)}, ValueError, r"--text: expected text, got none in .*empty\.txt"),
        (
            {"tasks": ("boolq",), "task_data": "nowhere"},
            FileNotFoundError,
            "--task-data: no such folder",
        ),
    ],
    ids=["text", "haystack", "empty", "task-data"],
)
def test_missing_files(
    folder: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
):
    (tmp_path / "empty.txt").write_text(" \n")
    paths = {
        key: tuple(tmp_path / v for v in value) if key in ("text", "haystack") else value
        for key, value in changes.items()
    }
    if "task_data" in paths:
        paths["task_data"] = tmp_path / paths["task_data"]
    with pytest.raises(error, match=message):
        measure(folder, tmp_path / "out", **paths)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing to evaluate: expected at least one of --text"),
        ({"text": (Path("a"),), "limit": 0}, "--limit: expected at least 1, got 0"),
        ({"tasks": ("a", "b", "a")}, "--tasks: expected different names, got a, b, a"),
        (
            {"text": (Path("a"),), "task_data": Path("b")},
            "--task-data: expected --tasks with it",
        ),
        (
            {"text": (Path("a"),), "settings": EvalSettings.from_overrides(NEEDLE)},
            r"--set needle\.\*: expected --haystack with it",
        ),
    ],
    ids=["nothing", "limit", "twice", "data-without-tasks", "setting-without-part"],
)
def test_requests_that_make_no_sense(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Evaluation(**changes)


def test_default_lengths():
    assert needle_lengths(NeedleSettings(), 4096) == (1024, 2048, 4096)
    assert needle_lengths(NeedleSettings(), 1024) == (512, 1024)
    assert needle_lengths(NeedleSettings(), 256) == (256,)
    assert needle_lengths(NeedleSettings(lengths=(99,)), 256) == (99,)


def test_default_output_is_named_after_the_model(tmp_path: Path):
    assert default_output(tmp_path / "best").parent == Path("runs/eval")
    assert default_output(tmp_path / "best").name.startswith("best-20")


def test_command_passes_every_option_on(folder: Path, tmp_path: Path):
    options = {
        "--model": folder / "model",
        "--haystack": folder / "text" / "0.txt",
        "--tasks": "boolq, arc_easy",
        "--task-data": folder / "tasks",
        "--set": "needle.lengths=[400]",
        "--limit": 1,
        "--output": tmp_path,
        "--seed": 3,
        "--device": "cpu",
    }
    arguments = [str(part) for option in options.items() for part in option]
    more = ["--set", "needle.depths=50", "--haystack", str(folder / "text" / "1.txt")]
    done = CliRunner().invoke(app, ["eval", *arguments, *more], catch_exceptions=False)
    assert done.exit_code == 0
    got = json.loads((tmp_path / "results.json").read_text())
    assert {(c["length"], c["depth"], c["num_keys"]) for c in got["needle"]} == {
        (400, 50, 1),
        (400, 50, 4),
    }
    assert {t["task"] for t in got["tasks"]} == {"boolq", "arc_easy"}
    assert got["settings"]["seed"] == 3
    assert len(got["settings"]["haystack"]) == 2


def test_command_that_writes_training_documents(folder: Path, tmp_path: Path):
    output = tmp_path / "needles.jsonl"
    options = {
        "--tokenizer": folder / "model",
        "--haystack": folder / "text",
        "--output": output,
        "--length": 400,
        "--documents": 3,
        "--keys": 2,
        "--digits": 4,
        "--seed": 5,
    }
    arguments = [str(part) for option in options.items() for part in option]
    done = CliRunner().invoke(app, ["needle-data", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    texts = [d.text for d in read_documents(find_files([output]))]
    assert len(texts) == 3
    assert all(text.count("What is the special magic number") == 2 for text in texts)
