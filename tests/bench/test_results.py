import io
import json

import pytest
from rich.console import Console
from tests.disk import full_disk

from nsa.bench.results import (
    COLUMNS,
    WIDE,
    append,
    latest,
    read,
    significant,
    terminal_table,
    with_speedup,
)


def row(**changes):
    made = {
        "device": "a machine",
        "dtype": "float32",
        "shape": "tiny",
        "seq_len": 2048,
        "workload": "local",
        "operation": "window_attention",
        "mode": "forward",
        "provider": "sdpa",
        "compressor": None,
        "p20_ms": 1.0,
        "p50_ms": 2.0,
        "p80_ms": 4.0,
        "peak_memory_bytes": 3 << 20,
        "flops": 4_000_000,
        "bytes": 8_000_000,
        "error": 2e-7,
        "overlap": 0.88,
        "time": "today",
    }
    return made | changes


def test_appended_rows_come_back_in_order(tmp_path):
    path = tmp_path / "new" / "ops.jsonl"
    append(path, [row(seq_len=1)])
    append(path, [row(seq_len=2), row(seq_len=3)])
    assert [made["seq_len"] for made in read(path)] == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 3


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "ops.jsonl"
    append(path, [row()])
    before = path.read_text()
    for room in (20, 0):  # for the beginning of a line, and for nothing
        with full_disk(len(before) + room), pytest.raises(OSError, match=r": '.*ops\.jsonl'"):
            append(path, [row(), row()])
        assert path.read_text() == before


@pytest.mark.parametrize(
    "line", ['{"device": "cut sho', "[1, 2]"], ids=["cut-short", "not-an-object"]
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "ops.jsonl"
    path.write_text(f"{json.dumps(row())}\n{line}\n")
    with pytest.raises(ValueError, match=r"ops\.jsonl:2: expected a JSON object, got"):
        read(path)


def test_latest_keeps_the_last_of_each_case_in_order():
    rows = [row(p50_ms=1.0), row(seq_len=4096), row(p50_ms=3.0)]
    assert latest(rows) == [row(p50_ms=3.0), row(seq_len=4096)]


def shown(rows, width):
    console = Console(width=width, file=io.StringIO())
    console.print(terminal_table(rows, width))
    return console.file.getvalue()


def test_a_wide_table_shows_every_column_and_derived_rates():
    text = shown([row()], WIDE)
    for part in ("88%", "2.00", "3.00", "2e-07"):
        assert part in text
    assert "2.00" in text  # 4e6 flops in 2 ms: 2 GFLOP/s
    assert "4.00" in text  # 8e6 bytes in 2 ms: 4 GB/s
    assert len([name for name in COLUMNS if name.split()[0] in text]) == len(COLUMNS)


def test_a_narrow_table_fits_and_keeps_the_median():
    text = shown([row()], 80)
    assert "window_attention" in text
    assert "2.00" in text
    assert "…" not in text


def test_a_problem_has_no_numbers():
    text = shown([row(problem="out of memory")], WIDE)
    assert "none" in text
    assert "2.00" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0012345, "0.00123"), (0.9999, "1.00"), (12.345, "12.3"), (98765, "98,800")],
)
def test_three_significant_digits(value, text):
    assert significant(value) == text


def test_speedups_are_over_the_dense_attention_of_the_same_task():
    dense = {"operation": "dense_attention", "compressor": None}
    rows = [
        row(p50_ms=2.0),
        row(p50_ms=2.0, seq_len=4096),
        row(p50_ms=2.0, mode="backward"),
        row(p50_ms=6.0, provider="sdpa", **dense),
        row(p50_ms=5.0, provider="cudnn", **dense),
        row(p50_ms=9.0, provider="flash", **dense),
        row(p50_ms=8.0, provider="sdpa", mode="backward", **dense),
    ]
    found = [made["speedup"] for made in with_speedup(rows)]
    assert found == [2.5, None, 4.0, 5 / 6, 1.0, 5 / 9, 1.0]


def test_speedups_are_over_the_dense_attention_of_the_same_run():
    dense = {"operation": "dense_attention", "provider": "sdpa"}
    rows = [
        row(p50_ms=2.0, time="first"),
        row(p50_ms=6.0, time="first", **dense),
        row(p50_ms=8.0, time="second", **dense),
        row(p50_ms=2.0, time="third", workload="random"),
    ]
    assert [made["speedup"] for made in with_speedup(rows)] == [3.0, 1.0, 1.0, 4.0]


def test_the_wide_table_shows_speedups():
    rows = [row(p50_ms=2.0), row(p50_ms=5.0, operation="dense_attention", provider="cudnn")]
    console = Console(file=io.StringIO(), width=WIDE)
    console.print(terminal_table(rows, WIDE))
    assert "2.50x" in console.file.getvalue()
