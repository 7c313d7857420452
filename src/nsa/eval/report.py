"""Results on screen (tables) and on disk (one JSON file)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from nsa.eval.needle_scores import NeedleCell
from nsa.eval.task_suites import TaskScore
from nsa.train.files import write_text
from nsa.train.validation import PositionLosses


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes results as JSON; ``path`` is the old file or the whole new one. NaN becomes null."""
    write_text(path, json.dumps(_plain(results), indent=1, ensure_ascii=False, allow_nan=False))


def perplexity_json(losses: PositionLosses) -> dict[str, Any]:
    """Losses in all and per bin of positions, as plain values."""
    bins = zip(
        losses.bin_edges, losses.bin_edges[1:], losses.bin_losses, losses.bin_tokens, strict=False
    )
    return {
        "loss": losses.loss,
        "perplexity": losses.perplexity,
        "num_tokens": losses.num_tokens,
        "num_documents": losses.num_documents,
        "bins": [
            {"first": first, "past": past, "loss": loss, "num_tokens": num_tokens}
            for first, past, loss, num_tokens in bins
        ],
    }


def needle_json(cells: Sequence[NeedleCell]) -> list[dict[str, Any]]:
    """Scores and every answer of each cell, as plain values."""
    return [
        {
            "num_keys": cell.num_keys,
            "length": cell.length,
            "depth": cell.depth,
            "accuracy": cell.accuracy,
            "log_likelihood": cell.log_likelihood,
            "answers": [dataclasses.asdict(answer) for answer in cell.answers],
        }
        for cell in cells
    ]


def tasks_json(scores: Sequence[TaskScore]) -> list[dict[str, Any]]:
    """Scores as plain values."""
    return [dataclasses.asdict(score) for score in scores]


def perplexity_table(losses: PositionLosses) -> Table:
    """Loss by distance from the start of the document, a bin a row."""
    table = Table(
        "position", title=f"Perplexity by position, {losses.num_documents} documents", min_width=48
    )
    for name in ("tokens", "nats/token", "perplexity"):
        table.add_column(name, justify="right")
    edges = losses.bin_edges
    for first, past, loss, num_tokens in zip(
        edges, edges[1:], losses.bin_losses, losses.bin_tokens, strict=False
    ):
        if num_tokens:
            table.add_row(f"{first} to {past - 1}", *_loss_columns(num_tokens, loss))
    table.add_section()
    table.add_row("all", *_loss_columns(losses.num_tokens, losses.loss))
    return table


def needle_tables(cells: Sequence[NeedleCell]) -> list[Table]:
    """Accuracy and mean log-likelihood, depth against length, a table per number of needles."""
    tables = []
    for num_keys in sorted({cell.num_keys for cell in cells}):
        mine = {(c.depth, c.length): c for c in cells if c.num_keys == num_keys}
        lengths = sorted({length for _, length in mine})
        samples = len(next(iter(mine.values())).answers)
        needles = "1 needle" if num_keys == 1 else f"1 of {num_keys} needles"
        table = Table(
            "depth",
            title=f"Needle in a haystack, {needles}",
            caption=f"found, of {samples} each; nats of the answer",
            min_width=48,
        )
        for length in lengths:
            table.add_column(f"{length} tokens", justify="right")
        for depth in sorted({depth for depth, _ in mine}):
            row = [mine.get((depth, length)) for length in lengths]
            table.add_row(
                f"{depth}%",
                *(f"{c.accuracy:.0%}  {c.log_likelihood:.1f}" if c else "" for c in row),
            )
        tables.append(table)
    return tables


def tasks_table(scores: Sequence[TaskScore]) -> Table:
    """A score a row; of a group its mean only, its tasks are in the file."""
    table = Table(title="Tasks", min_width=48)
    table.add_column("task", no_wrap=True)
    table.add_column("metric")
    for name in ("score", "+-", "questions", "shots"):
        table.add_column(name, justify="right", no_wrap=True)
    shots = {s.group: s.num_fewshot for s in scores if s.group}
    for score in scores:
        if score.group:
            continue
        num_fewshot = shots.get(score.task) if score.num_fewshot is None else score.num_fewshot
        table.add_row(
            score.task,
            score.metric.replace(",", ", "),
            f"{score.value:.4g}",
            "" if score.stderr is None else f"{score.stderr:.2g}",
            f"{score.num_items:,}",
            "" if num_fewshot is None else str(num_fewshot),
        )
    return table


def _loss_columns(num_tokens: int, loss: float) -> tuple[str, str, str]:
    return f"{num_tokens:,}", f"{loss:.3f}", f"{math.exp(min(loss, 700)):.4g}"


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: no NaN, no infinity, no paths, no tuples."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
