"""One evaluation: load a model, measure what was asked for, show and save it.

Everything that can be wrong is checked before the first long computation, and results are saved as
they come: an interruption loses the cell or the part that was running.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nsa.eval import report
from nsa.eval.haystack import Haystack
from nsa.eval.needle_plot import require_matplotlib, save_heat_map
from nsa.eval.needle_scores import NeedleCell, check_grid, needle_cells, num_samples
from nsa.eval.perplexity import perplexity_by_position
from nsa.eval.progress import progress_bar
from nsa.eval.provenance import provenance
from nsa.eval.settings import EvalSettings, NeedleSettings, PerplexitySettings, TaskSettings
from nsa.eval.task_suites import LoadedTasks, load_tasks, task_scores
from nsa.models import load_model
from nsa.train.documents import find_files, read_documents

RESULTS = "results.json"
HEAT_MAP = "needle.png"

# Four needles and a question take up to 300 tokens with a small vocabulary.
_LEAST_DEFAULT_LENGTH = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What to measure. Empty parts are not measured.

    Args:
        text: files or folders with long documents, for perplexity by position.
        haystack: files or folders with text to hide needles in.
        tasks: names of lm-eval's or local tasks.
        task_data: folder with the files of local tasks.
        settings: how to measure.
        limit: documents of ``text``, samples per needle cell and questions per task, at most.
        seed: of needles and of the choice of solved examples.
    """

    text: tuple[Path, ...] = ()
    haystack: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    settings: EvalSettings = field(default_factory=EvalSettings)
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.text or self.haystack or self.tasks):
            raise ValueError(
                "nothing to evaluate: expected at least one of --text (perplexity by position), "
                "--haystack (needle in a haystack) and --tasks."
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit: expected at least 1, got {self.limit}.")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks: expected different names, got {', '.join(self.tasks)}.")
        if self.task_data is not None and not self.tasks:
            raise ValueError("--task-data: expected --tasks with it, to say which tasks to run.")
        parts = (
            ("perplexity", self.text, "--text", PerplexitySettings()),
            ("needle", self.haystack, "--haystack", NeedleSettings()),
            ("tasks", self.tasks, "--tasks", TaskSettings()),
        )
        for name, given, option, default in parts:
            if not given and getattr(self.settings, name) != default:
                raise ValueError(f"--set {name}.*: expected {option} with it.")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, every default filled in."""
        return dataclasses.asdict(self)


def evaluate(
    model_path: Path,
    evaluation: Evaluation,
    *,
    output: Path,
    device: torch.device,
    console: Console,
) -> dict[str, Any]:
    """Measures a model, prints tables and writes ``results.json`` and ``needle.png``.

    Args:
        model_path: folder of the model and its tokenizer.
        evaluation: what to measure.
        output: folder to write to; it must not hold a ``results.json``.
        device: where to compute.
        console: where the tables go; progress bars go to standard error.

    Returns:
        What was written to ``results.json``.

    Raises:
        ValueError: ``output`` holds results; no valid model, bad data, or settings that do not fit
            the model.
        OSError: a file is not there, the disk is full, or the Hub does not answer.
        ImportError: a part needs a package that is not installed.

    Example:
        >>> evaluate(Path("runs/a/model"), Evaluation(text=(Path("books/"),)),
        ...          output=Path("runs/a/eval"), device=torch.device("cpu"), console=Console())
    """
    path = output / RESULTS
    if path.exists():
        raise ValueError(
            f"output: expected a folder without results, but {path} exists. Name another one."
        )
    parts = _prepare(model_path, evaluation, device)
    settings = evaluation.settings
    results: dict[str, Any] = {
        "provenance": provenance(parts.model, model_path),
        "settings": evaluation.to_dict(),
    }
    report.save(path, results)
    if parts.texts:
        with progress_bar("Perplexity, documents", len(parts.texts)) as advance:
            losses = perplexity_by_position(
                parts.model,
                parts.tokenizer,
                parts.texts,
                settings.perplexity,
                num_positions=parts.num_positions,
                on_documents=advance,
            )
        results["perplexity"] = report.perplexity_json(losses)
        report.save(path, results)
        console.print(report.perplexity_table(losses))
    if parts.haystack is not None:
        cells: list[NeedleCell] = []
        for cell in _measure_needles(parts, parts.haystack, evaluation.seed):
            cells.append(cell)
            results["needle"] = report.needle_json(cells)
            report.save(path, results)
        console.print(*report.needle_tables(cells), sep="\n")
        save_heat_map(cells, output / HEAT_MAP, title=model_path.resolve().name)
        console.print(f"Heat map: {output / HEAT_MAP}", soft_wrap=True)
    if parts.tasks is not None:
        scores = task_scores(
            parts.model,
            parts.tokenizer,
            parts.tasks,
            settings.tasks,
            limit=evaluation.limit,
            seed=evaluation.seed,
        )
        results["tasks"] = report.tasks_json(scores)
        report.save(path, results)
        console.print(report.tasks_table(scores))
    console.print(f"Results: {path}", soft_wrap=True)
    return results


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """Everything an evaluation reads, loaded and checked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    num_positions: int
    texts: list[str]
    haystack: Haystack | None
    needle: NeedleSettings
    lengths: tuple[int, ...]
    tasks: LoadedTasks | None


def _prepare(model_path: Path, evaluation: Evaluation, device: torch.device) -> _Parts:
    settings = evaluation.settings
    needle = settings.needle
    if evaluation.limit is not None:
        wanted = min(needle.num_samples, evaluation.limit)
        needle = dataclasses.replace(needle, num_samples=wanted)
    texts = _read(evaluation.text, "--text", evaluation.limit)
    hay = _read(evaluation.haystack, "--haystack", None)
    model, tokenizer = load_model(model_path)
    num_positions = model.config.max_position_embeddings
    haystack, lengths, tasks = None, (), None
    if hay:
        require_matplotlib()
        haystack = Haystack.from_texts(hay, tokenizer)
        lengths = needle_lengths(needle, num_positions)
        check_grid(haystack, needle, lengths)
    if evaluation.tasks:
        tasks = load_tasks(evaluation.tasks, settings.tasks, data=evaluation.task_data)
    model.to(device)  # pyright: ignore[reportArgumentType]
    return _Parts(
        model=model.eval(),
        tokenizer=tokenizer,
        num_positions=num_positions,
        texts=texts,
        haystack=haystack,
        needle=needle,
        lengths=lengths,
        tasks=tasks,
    )


def _read(paths: tuple[Path, ...], name: str, limit: int | None) -> list[str]:
    if not paths:
        return []
    files = find_files(paths, name=name)
    texts = [document.text for document in islice(read_documents(files), limit)]
    if not texts:
        raise ValueError(f"{name}: expected text, got none in {', '.join(map(str, paths))}.")
    return texts


def _measure_needles(parts: _Parts, haystack: Haystack, seed: int) -> Iterator[NeedleCell]:
    total = num_samples(parts.needle, parts.lengths)
    with progress_bar("Needles, questions", total) as advance:
        yield from needle_cells(
            parts.model,
            haystack,
            parts.needle,
            lengths=parts.lengths,
            seed=seed,
            on_samples=advance,
        )


def default_output(model_path: Path) -> Path:
    """A folder of its own for each evaluation: ``runs/eval/<model>-<UTC time>``."""
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Path("runs", "eval", f"{model_path.resolve().name}-{now}")


def needle_lengths(settings: NeedleSettings, num_positions: int) -> tuple[int, ...]:
    """The lengths to measure: of the settings, or a quarter, half and all positions, from 512 on.

    Raises:
        ValueError: a length exceeds ``num_positions``.
    """
    if settings.lengths is None:
        shares = (num_positions // 4, num_positions // 2)
        return (*(n for n in shares if n >= _LEAST_DEFAULT_LENGTH), num_positions)
    if max(settings.lengths) > num_positions:
        raise ValueError(
            f"needle.lengths: expected at most {num_positions}, the positions of the model, "
            f"got {max(settings.lengths)}."
        )
    return settings.lengths
