"""The parts of README.md that are generated: tables of measured numbers and the source tree.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``. ``nsa bench table``
writes it anew and a test fails when it is out of date, so no number in the README is typed.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from nsa.bench.results import (
    ARMS,
    Row,
    group_size,
    is_grouped,
    latest,
    read,
    significant,
    with_speedup,
)

PART = re.compile(
    r"(?P<start><!-- generated: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end: (?P=name) -->)",
    re.DOTALL,
)


def refresh(text: str, root: Path) -> str:
    """``text`` with every generated part written anew from the files under ``root``.

    Raises:
        ValueError: a part has a name that nothing generates.
    """

    def regenerate(part: re.Match[str]) -> str:
        name = part["name"]
        if name not in PARTS:
            raise ValueError(f"generated: expected one of {', '.join(PARTS)}, got {name!r}.")
        return f"{part['start']}{PARTS[name](root)}\n{part['end']}"

    return PART.sub(regenerate, text)


def write(path: Path, root: Path) -> None:
    """Refreshes a file in place."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(refresh(path.read_text(encoding="utf-8"), root), encoding="utf-8")
    temporary.replace(path)


def source_tree(root: Path) -> str:
    """Every package and its first line of documentation."""
    source = root / "src" / "nsa"
    entries = [source / "config.py"]
    entries += sorted(path for path in source.glob("*/__init__.py"))
    entries += [source / "cli.py"]
    lines = []
    for path in entries:
        name = f"{path.parent.name}/" if path.name == "__init__.py" else path.name
        documentation = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        summary = documentation.split("\n\n")[0].replace("\n", " ")
        lines.append(f"  {name:<12}{summary}".rstrip())
    return "\n".join(["```", "src/nsa/", *lines, "```"])


def operations_table(root: Path) -> str:
    """The whole layer beside dense attention, for each device, dtype and shape measured."""
    rows = [row for row in _rows(root) if not is_grouped(row)]
    if not rows:
        return MISSING
    return "\n\n".join(
        "\n\n".join((_caption(part), _times(part, *TOKENS), *_memory(part)))
        for part in _by_setup(rows)
    )


def graphs_table(root: Path) -> str:
    """The whole layer beside dense attention, each started as one CUDA graph."""
    rows = _rows(root, graphs=True)
    if not rows:
        return "Nothing is measured yet: run `nsa bench ops --graph`, then `nsa bench table`."
    return "\n\n".join(f"{_caption(part)}\n\n{_times(part, *TOKENS)}" for part in _by_setup(rows))


def groups_table(root: Path) -> str:
    """Groups of several sizes, narrow heads first."""
    rows = [row for row in _rows(root) if is_grouped(row)]
    if not rows:
        return MISSING
    return "\n\n".join(
        f"{_caption(part, heads=False)}\n\n{_times(part, 'heads a group', group_size)}"
        for part in _by_setup(sorted(rows, key=_widths), _widths)
    )


def demo_table(root: Path) -> str:
    """The last demo in ``results/demo.jsonl``: both twins."""
    path = root / "results" / "demo.jsonl"
    if not path.exists():
        return "Nothing is measured yet: run `make demo`, then add its results.json."
    row = read(path)[-1]
    twins = row["twins"]
    lines = [
        "| | parameters | training, tokens/s | held-out loss, nats a token | below unigrams |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {twin['num_parameters']:,} | {twin['tokens_per_second']:,.0f} | "
        f"{twin['loss']:.3f} | {row['unigram_entropy'] - twin['loss']:.3f} |"
        for name, twin in twins.items()
    ]
    gap = twins["nsa"]["loss"] - twins["dense"]["loss"]
    seconds = row.get("seconds")
    took = "" if seconds is None else f" All of it took {seconds / 60:.1f} minutes."
    caption = (
        f"{row['book']}: {row['train_tokens']:,} tokens of training, "
        f"{twins['nsa']['num_tokens']:,} held out; {row['device']}, {row['threads']} threads, "
        f"PyTorch {row['torch']}, commit {_commits([row])}. The sparse model's "
        f"loss is {gap:+.3f} from its dense twin's.{took}"
    )
    return "\n".join([caption, "", *lines])


def training_table(root: Path) -> str:
    """Kernels, reference and dense twin in training, and how far losses are from the reference's.

    Of runs in ``results/training.jsonl`` with the same text, steps and settings, the last of each.
    """
    path = root / "results" / "training.jsonl"
    if not path.exists():
        return "Nothing is measured yet: run `nsa bench training`, then `nsa bench table`."
    setups: dict[str, dict[tuple[str, bool], Row]] = {}
    for row in read(path):
        named = (row[key] for key in ("device", "config", "steps", "data", "settings"))
        alike = (*named, row.get("num_processes", 1))
        setup = setups.setdefault(json.dumps(alike, sort_keys=True), {})
        setup[row["arm"], row["compile"]] = row
    return "\n\n".join(_arms(list(setup.values())) for setup in setups.values())


def _arms(rows: list[Row]) -> str:
    last = rows[-1]
    seq_len, num_rows = (last["settings"][key] for key in ("data.seq_len", "training.batch_rows"))
    apart = max((b[0] - a[0] for a, b in pairwise(last["losses"])), default=1)
    processes = last.get("num_processes", 1)
    device = f"{processes} x {last['device']}" if processes > 1 else last["device"]
    caption = (
        f"{last['config']}: {last['steps']} steps of {num_rows * seq_len:,} tokens in rows of "
        f"{seq_len:,}; {device}, PyTorch {last['torch']}, commit {_commits(rows)}. A loss "
        f"is the mean of {apart} step{'s' if apart > 1 else ''}."
    )
    lines = [
        "| | parameters | tokens/s | first loss | last loss | less the reference's: mean, most |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    reference = next((_means(row) for row in rows if row["arm"] == "reference"), {})
    for row in sorted(rows, key=lambda row: ARMS.index(row["arm"])):
        losses, rate = row["losses"], row["tokens_per_second"]
        away = [loss - reference[key] for key, loss in _means(row).items() if key in reference]
        cells = [
            f"{row['arm']}, compiled" if row["compile"] else row["arm"],
            f"{row['num_parameters']:,}",
            "-" if rate is None else f"{rate:,.0f}",
            *(f"{losses[i][1]:.3f}" for i in (0, -1)),
            f"{fmean(away):+.4f}, {max(away, key=abs):+.4f}"
            if row["arm"] == "kernel" and away
            else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([caption, "", *lines])


def _means(row: Row) -> dict[tuple[int, int], float]:
    """Losses by the steps that each is the mean of; a run that was stopped starts a mean anew."""
    starts = [0, *(step for step, _ in row["losses"])]
    return {(since, step): loss for since, (step, loss) in zip(starts, row["losses"], strict=False)}


def needle_table(root: Path) -> str:
    """The last needle test in ``results/needle.jsonl``: how often each needle was found."""
    path = root / "results" / "needle.jsonl"
    if not path.exists():
        return "Nothing is measured yet: see configs/needle-4k.yaml."
    row = read(path)[-1]
    cells = row["needle"]
    tests = list(dict.fromkeys((cell["num_keys"], cell["length"]) for cell in cells))
    found = {(cell["num_keys"], cell["length"], cell["depth"]): cell["accuracy"] for cell in cells}
    names = [f"{length:,} tokens, 1 of {keys}" for keys, length in tests]
    lines = [f"| depth | {' | '.join(names)} |", f"|{'---:|' * (len(tests) + 1)}"]
    for depth in dict.fromkeys(cell["depth"] for cell in cells):
        lines.append(f"| {depth}% | {' | '.join(f'{found[*test, depth]:.0%}' for test in tests)} |")
    model, machine = row["provenance"]["model"], row["provenance"]["machine"]
    asked = row["settings"]
    samples = asked["settings"]["needle"]["num_samples"]
    samples = min(samples, asked["limit"] or samples)
    mean = sum(cell["accuracy"] for cell in cells) / len(cells)
    read_keys = model["config"]["num_selected_blocks"] * model["config"]["block_size"]
    caption = (
        f"{mean:.1%} of {samples * len(cells)} numbers found, {samples} questions a cell, by a "
        f"sparse model of {model['num_parameters']:,} parameters that selects {read_keys:,} keys a "
        f"token and sees the last {model['config']['window_size']}; {machine['name']}, PyTorch "
        f"{row['provenance']['versions']['torch']}, commit "
        f"{_commits([row['provenance']])}."
    )
    return "\n".join([caption, "", *lines])


MISSING = "Nothing is measured yet: run `nsa bench ops`, then `nsa bench table`."
# What a backward's row says of memory, and the line above its table.
MEMORY = {
    "peak_memory_bytes": "Peak memory of forward and backward on top of the inputs, GiB:",
    "kept_memory_bytes": "Kept between forward and backward, inputs included, GiB:",
}
# In the order of a table's columns.
SHOWN = ("dense_attention", "pipeline", "recompute_pipeline", "shared_pipeline")
# Heading and value of a row of the table.
TOKENS = ("tokens", lambda row: row["seq_len"])


def _rows(root: Path, *, graphs: bool = False) -> list[Row]:
    path = root / "results" / ("graphs.jsonl" if graphs else "ops.jsonl")
    if not path.exists():
        return []
    rows = [row for row in read(path) if not row["quick"] and row["operation"] in SHOWN]
    # What was measured before there were graphs does not say that it was none.
    rows = [row for row in rows if row.get("graph", False) == graphs]
    return latest(with_speedup(rows))


def _by_setup(
    rows: list[Row], layer: Callable[[Row], Any] = lambda row: row["shape"]
) -> list[list[Row]]:
    """Rows of each device, dtype and layer, those of GPUs first: only a CPU's have threads."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: bool(row.get("threads"))):
        found.setdefault((row["device"], row["dtype"], layer(row)), []).append(row)
    return list(found.values())


def _widths(row: Row) -> tuple[int, int]:
    return row["key_dim"], row["value_dim"]


def _caption(rows: list[Row], heads: bool = True) -> str:
    last = rows[-1]
    counts = sorted({row["num_heads"] for row in rows})
    layer = f"{counts[0]} query " if len(counts) == 1 else f"{counts[0]} to {counts[-1]} query "
    layer += (
        f"and {last['num_kv_heads']} kv heads" if heads else f"heads, {last['seq_len']:,} tokens"
    )
    return (
        f"{last['device']}, {last['dtype']}, {layer}, widths {last['key_dim']} and "
        f"{last['value_dim']}, PyTorch {last['torch']}: median ms, forward / backward "
        f"(times as fast as dense attention; commit {_commits(rows)})."
    )


def _commits(rows: list[Row]) -> str:
    """What was measured; a commit whose files had been changed is not all of it."""

    def name(row: Row) -> str:
        changed = " with changes" if row.get("dirty") else ""
        return (row["commit"] or "unknown")[:9] + changed

    return ", ".join(dict.fromkeys(map(name, rows)))


def _times(rows: list[Row], heading: str, key: Callable[[Row], int]) -> str:
    def cell(modes: dict[str, Row]) -> str:
        both = [modes.get(mode) for mode in ("forward", "backward")]
        times = " / ".join("-" if row is None else significant(row["p50_ms"]) for row in both)
        ratios = [None if row is None else row["speedup"] for row in both]
        if all(ratio in (None, 1) for ratio in ratios):
            return times
        shown = ("-" if ratio is None else f"{ratio:.1f}x" for ratio in ratios)
        return f"{times} ({' / '.join(shown)})"

    return _grid(rows, heading, key, cell)


def _memory(rows: list[Row]) -> Iterator[str]:
    """The tables of memory, each below its line.

    They are of backwards that say it: those of earlier versions do not say what is kept.
    """
    backwards = [row for row in rows if row["mode"] == "backward"]
    for field, line in MEMORY.items():
        measured = [row for row in backwards if row.get(field) is not None]
        if measured:
            yield line
            yield _grid(measured, *TOKENS, partial(_gibibytes, field))


def _gibibytes(field: str, modes: dict[str, Row]) -> str:
    return significant(modes["backward"][field] / 2**30) if modes else "-"


def _grid(
    rows: list[Row],
    heading: str,
    key: Callable[[Row], int],
    cell: Callable[[dict[str, Row]], str],
) -> str:
    """A table with a column for each implementation; ``cell`` gets its rows by mode."""
    by_kind = sorted(rows, key=lambda row: SHOWN.index(row["operation"]))
    columns = list(dict.fromkeys(_column(row) for row in by_kind))
    found: dict[tuple[int, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((key(row), _column(row)), {})[row["mode"]] = row
    lines = [f"| {heading} | {' | '.join(columns)} |", f"|{'---:|' * (len(columns) + 1)}"]
    for value in sorted({key(row) for row in rows}):
        cells = (cell(found.get((value, column), {})) for column in columns)
        lines.append(f"| {value:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _column(row: Row) -> str:
    if row["operation"] == "dense_attention":
        return f"dense ({row['provider']})"
    if row["operation"] == "shared_pipeline":
        return f"shared K/V, mean of {row['geometry'][2]} ({row['provider']}, {row['workload']})"
    recomputing = ", recomputing" if row["operation"] == "recompute_pipeline" else ""
    return f"NSA {row['compressor']}{recomputing} ({row['provider']}, {row['workload']})"


PARTS: dict[str, Callable[[Path], str]] = {
    "tree": source_tree,
    "operations": operations_table,
    "graphs": graphs_table,
    "groups": groups_table,
    "training": training_table,
    "demo": demo_table,
    "needle": needle_table,
}
