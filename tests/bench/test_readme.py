import json

import pytest

from nsa.bench.readme import operations_table, refresh, source_tree, write


def row(**changes):
    made = {
        "device": "a machine",
        "dtype": "float32",
        "shape": "laptop",
        "seq_len": 2048,
        "workload": "local",
        "operation": "pipeline",
        "mode": "forward",
        "provider": "reference",
        "compressor": "mlp",
        "p50_ms": 12.34,
        "quick": False,
        "num_heads": 4,
        "num_kv_heads": 2,
        "key_dim": 64,
        "value_dim": 64,
        "torch": "2.13.0",
        "commit": "0123456789abcdef",
    }
    return made | changes


@pytest.fixture
def root(tmp_path):
    source = tmp_path / "src" / "nsa"
    (source / "ops").mkdir(parents=True)
    (source / "config.py").write_text('"""Geometry\nof it."""\n')
    (source / "ops" / "__init__.py").write_text('"""Operations.\n\nMore."""\n')
    (source / "cli.py").write_text('"""The command."""\n')
    (tmp_path / "results").mkdir()
    rows = [
        row(p50_ms=99.0),
        row(),
        row(mode="backward", p50_ms=30.0),
        row(operation="dense_attention", provider="sdpa", p50_ms=0.5),
        row(seq_len=4096, p50_ms=1234.5),
        row(operation="window_attention"),
        row(seq_len=8192, quick=True),
    ]
    (tmp_path / "results" / "ops.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_the_tree_has_a_line_for_each_package(root):
    assert source_tree(root).splitlines() == [
        "```",
        "src/nsa/",
        "  config.py   Geometry of it.",
        "  ops/        Operations.",
        "  cli.py      The command.",
        "```",
    ]


def test_the_table_has_the_latest_numbers_of_the_layer_and_its_dense_rival(root):
    assert operations_table(root).splitlines() == [
        "a machine, float32, 4 query and 2 kv heads, widths 64 and 64, PyTorch 2.13.0: median ms, "
        "forward / backward (commit 012345678).",
        "",
        "| tokens | NSA (reference, local queries) | dense (sdpa) |",
        "|---:|---:|---:|",
        "| 2,048 | 12.3 / 30.0 | 0.500 / - |",
        "| 4,096 | 1,230 / - | - / - |",
    ]


def test_without_measurements_the_table_says_how_to_make_them(root):
    (root / "results" / "ops.jsonl").unlink()
    assert "run `nsa bench ops`" in operations_table(root)


def test_write_replaces_generated_parts_and_nothing_else(root):
    path = root / "README.md"
    path.write_text("before\n<!-- generated: tree -->\nstale\n<!-- end: tree -->\nafter\n")
    write(path, root)
    text = path.read_text()
    assert text.startswith("before\n<!-- generated: tree -->\n```\nsrc/nsa/")
    assert text.endswith("```\n<!-- end: tree -->\nafter\n")
    assert "stale" not in text
    assert refresh(text, root) == text


def test_an_unknown_part_is_refused(root):
    with pytest.raises(
        ValueError, match="generated: expected one of tree, operations, got 'trees'"
    ):
        refresh("<!-- generated: trees -->\n<!-- end: trees -->", root)
