"""Results on disk (one JSON object a line, appended) and on screen."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from nsa.train.files import naming

Row = dict[str, Any]

# What makes two measurements the same one, so that the later replaces the earlier in tables.
KEY = ("device", "dtype", "shape", "seq_len", "workload", "operation", "mode", "provider")
KEY += ("compressor",)


# What ``nsa bench training`` runs: the sparse model twice, then its dense twin.
ARMS = ("kernel", "reference", "dense")


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a JSON lines file in one write: whoever stops us leaves whole lines.

    Raises:
        OSError: the disk is full; the file is as it was.
    """
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with naming(path):
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, text) < len(text):
                # A nearly full disk takes the beginning and reports no error.
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file, oldest first.

    Raises:
        ValueError: a line is not a JSON object; the message names the line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _not_a_row(path, number, line) from error
        if not isinstance(row, dict):
            raise _not_a_row(path, number, line)
        rows.append(row)
    return rows


def _not_a_row(path: Path, number: int, line: str) -> ValueError:
    return ValueError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}.")


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last measurement of each case, in order of first appearance."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        newest[tuple(row[name] for name in KEY)] = row
    return list(newest.values())


def is_grouped(row: Row) -> bool:
    """Whether its shape is one of those that differ in how many heads share keys."""
    return re.fullmatch(r"(\w+-)*group-\d+", row["shape"]) is not None


def group_size(row: Row) -> int:
    """Query heads that share a pair of keys and values."""
    return row["num_heads"] // row["num_kv_heads"]


def with_speedup(rows: Iterable[Row]) -> list[Row]:
    """Rows with ``speedup``: how many times as long dense attention takes, None without it.

    Dense attention of the same device, dtype, shape, length and mode, by the first of ``DENSE``
    that was measured: in the same run, whose rows have one time, or else the last time.
    """
    rows = list(rows)
    dense: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["operation"] == "dense_attention" and row["provider"] in DENSE:
            for run in (row["time"], None):
                dense.setdefault((run, *_same_task(row)), {})[row["provider"]] = row["p50_ms"]
    found = []
    for row in rows:
        task = _same_task(row)
        rivals = dense.get((row["time"], *task)) or dense.get((None, *task), {})
        rival = next((rivals[name] for name in DENSE if name in rivals), None)
        found.append({**row, "speedup": None if rival is None else rival / row["p50_ms"]})
    return found


# Dense attention that speed-ups refer to: the fastest on a GPU, PyTorch's choice elsewhere.
DENSE = ("cudnn", "sdpa")


def _same_task(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("device", "dtype", "shape", "seq_len", "mode"))


def terminal_table(rows: list[Row], width: int) -> Table:
    """What was measured, one case a row; terminals too narrow for every column get the best.

    ``dense`` is the speed-up over dense attention among the same rows.
    """
    first = rows[0]
    fast = with_speedup([row for row in rows if "problem" not in row])
    speedups = {tuple(row[name] for name in KEY): row["speedup"] for row in fast}
    table = Table(title=f"{first['shape']}, {first['dtype']}, {first['device']}")
    columns = [name for name in COLUMNS if width >= WIDE or name in NARROW]
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 3 else "right", no_wrap=number < 3)
    for row in rows:
        cells = _cells(row)
        if (speedup := speedups.get(tuple(row[name] for name in KEY))) is not None:
            cells["dense"] = f"{significant(speedup)}x"
        table.add_row(*(cells.get(name, "") for name in columns))
    return table


COLUMNS = ("operation", "mode", "provider", "queries", "tokens", "overlap", "p20 ms", "p50 ms")
COLUMNS += ("p80 ms", "dense", "MiB", "GFLOP/s", "GB/s", "error")
NARROW = ("operation", "mode", "provider", "queries", "tokens", "p50 ms")
WIDE = 152


def _cells(row: Row) -> dict[str, str]:
    cells = {name: row[name] for name in ("operation", "mode", "provider")}
    if row["compressor"] is not None:
        cells["operation"] += f" ({row['compressor']})"
    cells |= {"queries": row["workload"], "tokens": f"{row['seq_len']:,}"}
    if "problem" in row:
        return cells | {"p50 ms": "[red]none"}
    seconds, memory = row["p50_ms"] / 1e3, row["peak_memory_bytes"]
    return cells | {
        "overlap": "" if row["overlap"] is None else f"{row['overlap']:.0%}",
        "p20 ms": significant(row["p20_ms"]),
        "p50 ms": significant(row["p50_ms"]),
        "p80 ms": significant(row["p80_ms"]),
        "MiB": "" if memory is None else significant(memory / 2**20),
        "GFLOP/s": significant(row["flops"] / seconds / 1e9),
        "GB/s": significant(row["bytes"] / seconds / 1e9),
        "error": f"{row['error']:.0e}",
    }


def significant(value: float) -> str:
    """Three significant digits without an exponent, thousands apart."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - int(f"{rounded:e}".split("e")[1]))
    return f"{rounded:,.{decimals}f}"
