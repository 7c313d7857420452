"""The parts of README.md that are generated: tables of measured numbers and the source tree.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``. ``nsa bench table``
writes it anew and a test fails when it is out of date, so no number in the README is typed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

from nsa.bench.results import Row, latest, read, significant

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
    path = root / "results" / "ops.jsonl"
    if not path.exists():
        return "Nothing is measured yet: run `nsa bench ops`, then `nsa bench table`."
    rows = [row for row in read(path) if not row["quick"]]
    rows = [row for row in latest(rows) if row["operation"] in ("pipeline", "dense_attention")]
    setups = dict.fromkeys((row["device"], row["dtype"], row["shape"]) for row in rows)
    return "\n\n".join(
        _table([row for row in rows if (row["device"], row["dtype"], row["shape"]) == setup])
        for setup in setups
    )


def _table(rows: list[Row]) -> str:
    first = rows[-1]
    columns = list(dict.fromkeys(_column(row) for row in rows))
    cells = {(row["seq_len"], _column(row), row["mode"]): row["p50_ms"] for row in rows}
    lines = [
        f"{first['device']}, {first['dtype']}, {first['num_heads']} query and "
        f"{first['num_kv_heads']} kv heads, widths {first['key_dim']} and {first['value_dim']}, "
        f"PyTorch {first['torch']}: median ms, forward / backward (commit {first['commit'][:9]}).",
        "",
        f"| tokens | {' | '.join(columns)} |",
        f"|{'---:|' * (len(columns) + 1)}",
    ]
    for seq_len in sorted({row["seq_len"] for row in rows}):
        times = []
        for column in columns:
            both = [cells.get((seq_len, column, mode)) for mode in ("forward", "backward")]
            times.append(" / ".join("-" if ms is None else significant(ms) for ms in both))
        lines.append(f"| {seq_len:,} | {' | '.join(times)} |")
    return "\n".join(lines)


def _column(row: Row) -> str:
    if row["operation"] == "dense_attention":
        return f"dense ({row['provider']})"
    return f"NSA ({row['provider']}, {row['workload']} queries)"


PARTS: dict[str, Callable[[Path], str]] = {
    "tree": source_tree,
    "operations": operations_table,
}
