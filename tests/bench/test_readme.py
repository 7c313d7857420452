import json

import pytest

from nsa.bench.readme import (
    demo_table,
    graphs_table,
    groups_table,
    needle_table,
    operations_table,
    refresh,
    source_tree,
    training_table,
    write,
)


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
        "geometry": [16, 16, 16, 8, 1, 2, 64],
        "peak_memory_bytes": None,
        "time": "today",
    }
    return made | changes


DENSE = {"operation": "dense_attention", "provider": "cudnn", "compressor": None}


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
        row(mode="backward", p50_ms=30.0, peak_memory_bytes=3 << 29),
        row(operation="dense_attention", provider="sdpa", compressor=None, p50_ms=6.17),
        row(seq_len=4096, p50_ms=1234.5),
        row(operation="window_attention"),
        row(operation="shared_pipeline", provider="fla", seq_len=4096, p50_ms=1.0),
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


HEAD = (
    "| tokens | dense (sdpa) | NSA mlp (reference, local) | shared K/V, mean of 16 (fla, local) |"
)


def test_the_table_has_the_latest_numbers_of_the_layer_and_its_dense_rival(root):
    times, memory = operations_table(root).split(
        "\n\nPeak memory of forward and backward on top of the inputs, GiB:\n\n"
    )
    assert times.splitlines() == [
        "a machine, float32, 4 query and 2 kv heads, widths 64 and 64, PyTorch 2.13.0: median ms, "
        "forward / backward (times as fast as dense attention; commit 012345678).",
        "",
        HEAD,
        "|---:|---:|---:|---:|",
        "| 2,048 | 6.17 / - | 12.3 / 30.0 (0.5x / -) | - / - |",
        "| 4,096 | - / - | 1,230 / - | 1.00 / - |",
    ]
    assert memory.splitlines() == [
        "| tokens | NSA mlp (reference, local) |",
        "|---:|---:|",
        "| 2,048 | 1.50 |",
    ]


def test_what_is_kept_has_a_table_where_a_row_says_it(root):
    recomputing = {"operation": "recompute_pipeline", "mode": "backward", "workload": "local"}
    longer = row(**recomputing, seq_len=4096, kept_memory_bytes=1 << 29)
    dense = row(**{**DENSE, "mode": "backward"}, kept_memory_bytes=1 << 28)
    rows = [longer, dense, row(shape="other", mode="backward", peak_memory_bytes=1)]
    with (root / "results" / "ops.jsonl").open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    first, second = operations_table(root).split("\n\nKept between forward and backward, ")
    assert "Peak memory" in first
    kept, other = second.split("\n\na machine, ")
    assert kept.splitlines() == [
        "inputs included, GiB:",
        "",
        "| tokens | dense (cudnn) | NSA mlp, recomputing (reference, local) |",
        "|---:|---:|---:|",
        "| 2,048 | 0.250 | - |",
        "| 4,096 | - | 0.500 |",
    ]
    assert "Peak memory" in other


def test_rows_of_cuda_graphs_have_a_table_of_their_own(root):
    rows = [
        row(shape=shape, num_kv_heads=heads, graph=True, **changes)
        for shape, heads in (("laptop", 2), ("other", 1))
        for changes in ({"p50_ms": 2.0}, {"p50_ms": 3.0, **DENSE})
    ]
    for name in ("graphs.jsonl", "ops.jsonl"):
        with (root / "results" / name).open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in rows)
    lines = graphs_table(root).splitlines()
    assert [line[:40] for line in lines if "kv heads" in line] == [
        "a machine, float32, 4 query and 2 kv hea",
        "a machine, float32, 4 query and 1 kv hea",
    ]
    assert lines.count("| 2,048 | 3.00 / - | 2.00 / - (1.5x / -) |") == 2
    assert "2.00" not in operations_table(root)


def test_the_groups_table_has_a_line_for_each_group_size(root):
    rows = [
        row(shape=shape, num_heads=32, num_kv_heads=32 // size, key_dim=dk, mode=mode, **changes)
        for shape, size, dk in (("wide-group-2", 2, 96), ("group-8", 8, 64), ("group-1", 1, 64))
        for mode, changes in (
            ("forward", {"p50_ms": 4.0}),
            ("forward", {"p50_ms": 10.0 * size, **DENSE}),
        )
    ]
    path = root / "results" / "ops.jsonl"
    path.write_text(path.read_text() + "".join(json.dumps(r) + "\n" for r in rows))
    assert groups_table(root).splitlines() == [
        "a machine, float32, 32 query heads, 2,048 tokens, widths 64 and 64, PyTorch 2.13.0: "
        "median ms, forward / backward (times as fast as dense attention; commit 012345678).",
        "",
        "| heads a group | dense (cudnn) | NSA mlp (reference, local) |",
        "|---:|---:|---:|",
        "| 1 | 10.0 / - | 4.00 / - (2.5x / -) |",
        "| 8 | 80.0 / - | 4.00 / - (20.0x / -) |",
        "",
        "a machine, float32, 32 query heads, 2,048 tokens, widths 96 and 64, PyTorch 2.13.0: "
        "median ms, forward / backward (times as fast as dense attention; commit 012345678).",
        "",
        "| heads a group | dense (cudnn) | NSA mlp (reference, local) |",
        "|---:|---:|---:|",
        "| 2 | 20.0 / - | 4.00 / - (5.0x / -) |",
    ]
    assert "group" not in operations_table(root)


def test_groups_of_two_machines_have_a_table_each(root):
    rows = [row(shape="group-2", device=device) for device in ("one", "another")]
    (root / "results" / "ops.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    first, second = groups_table(root).split("\n\nanother, ")
    assert first.startswith("one, float32")
    assert first.count("12.3 / -") == second.count("12.3 / -") == 1


def test_a_commit_with_changes_is_not_called_that_commit(root):
    (root / "results" / "ops.jsonl").write_text(json.dumps(row(dirty=True)) + "\n")
    assert "commit 012345678 with changes)" in operations_table(root)


def test_rows_of_an_installed_package_have_no_commit(root):
    (root / "results" / "ops.jsonl").write_text(json.dumps(row(commit=None)) + "\n")
    assert "commit unknown)" in operations_table(root)


def test_without_measurements_the_table_says_how_to_make_them(root):
    (root / "results" / "ops.jsonl").unlink()
    assert "run `nsa bench ops`" in operations_table(root)
    assert "run `nsa bench ops`" in groups_table(root)
    assert "run `nsa bench ops --graph`" in graphs_table(root)


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
        ValueError,
        match="generated: expected one of tree, operations, graphs, groups, training, demo, "
        "needle, got 'trees'",
    ):
        refresh("<!-- generated: trees -->\n<!-- end: trees -->", root)


def test_the_demo_table_shows_both_twins(tmp_path):
    assert "make demo" in demo_table(tmp_path)
    twin = {"num_parameters": 1000, "tokens_per_second": 12.4, "num_tokens": 50}
    row = {
        "book": "A Book",
        "unigram_entropy": 6.0,
        "seconds": 270.0,
        "train_tokens": 4096,
        "twins": {"nsa": {**twin, "loss": 4.75}, "dense": {**twin, "loss": 4.5}},
        "device": "CPU",
        "threads": 2,
        "torch": "2",
        "commit": None,
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "demo.jsonl").write_text(f"{json.dumps(row)}\n")
    table = demo_table(tmp_path)
    assert "| nsa | 1,000 | 12 | 4.750 | 1.250 |" in table
    assert "| dense | 1,000 | 12 | 4.500 | 1.500 |" in table
    assert "+0.250 from its dense twin's. All of it took 4.5 minutes." in table


def test_the_needle_table_has_a_line_for_each_depth(tmp_path):
    assert "configs/needle-4k.yaml" in needle_table(tmp_path)
    config = {"num_selected_blocks": 16, "block_size": 64, "window_size": 512}
    row = {
        "provenance": {
            "model": {"num_parameters": 1000, "config": config},
            "machine": {"name": "A GPU"},
            "versions": {"torch": "2"},
            "commit": None,
        },
        "settings": {"settings": {"needle": {"num_samples": 12}}, "limit": 10},
        "needle": [
            {"num_keys": keys, "length": 1024, "depth": depth, "accuracy": accuracy}
            for keys, depth, accuracy in ((1, 0, 1.0), (1, 50, 0.4), (4, 0, 0.9), (4, 50, 0.5))
        ],
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "needle.jsonl").write_text(f"{json.dumps(row)}\n")
    assert needle_table(tmp_path).splitlines() == [
        "70.0% of 40 numbers found, 10 questions a cell, by a sparse model of 1,000 parameters "
        "that selects 1,024 keys a token and sees the last 512; A GPU, PyTorch 2, commit unknown.",
        "",
        "| depth | 1,024 tokens, 1 of 1 | 1,024 tokens, 1 of 4 |",
        "|---:|---:|---:|",
        "| 0% | 100% | 90% |",
        "| 50% | 40% | 50% |",
    ]


def trained(arm, losses, **changes):
    made = {"arm": arm, "losses": losses, "config": "small", "num_parameters": 1000, "steps": 20}
    settings = {"data.seq_len": 64, "training.batch_rows": 2, "training.learning_rate": 0.1}
    made |= {"settings": settings, "compile": False, "data": "digest", "device": "a GPU"}
    made |= {"tokens_per_second": 1234.5, "torch": "2.13.0", "commit": "0123456789abcdef"}
    return made | changes


def test_training_is_shown_beside_the_reference(tmp_path):
    assert "Nothing is measured yet" in training_table(tmp_path)
    slower = trained("kernel", [])["settings"] | {"training.learning_rate": 0.01}
    rows = [
        trained("dense", [[10, 4.0], [20, 3.0]], num_parameters=900),
        trained("reference", [[10, 9.9], [20, 9.9]]),
        trained("reference", [[10, 4.0], [20, 3.25]], tokens_per_second=None),
        trained("kernel", [[10, 4.5], [20, 3.0]]),
        trained("kernel", [[10, 4.0], [20, 3.25]], compile=True),
        trained("kernel", [[10, 1.0], [20, 1.0]], data="other"),
        trained("kernel", [[10, 1.0], [20, 1.0]], settings=slower),
        trained("kernel", [[10, 1.0], [20, 1.0]], num_processes=8),
    ]
    (tmp_path / "results").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "results" / "training.jsonl").write_text(lines)
    first, second, third, fourth = training_table(tmp_path).split("\n\nsmall: ")
    assert "20 steps of 128 tokens in rows of 64; a GPU" in first
    assert "A loss is the mean of 10 steps." in first
    assert first.splitlines()[-4:] == [
        "| kernel | 1,000 | 1,234 | 4.500 | 3.000 | +0.1250, +0.5000 |",
        "| kernel, compiled | 1,000 | 1,234 | 4.000 | 3.250 | +0.0000, +0.0000 |",
        "| reference | 1,000 | - | 4.000 | 3.250 | - |",
        "| dense | 900 | 1,234 | 4.000 | 3.000 | - |",
    ]
    assert second.splitlines()[-1] == "| kernel | 1,000 | 1,234 | 1.000 | 1.000 | - |"
    assert third.splitlines()[-1] == "| kernel | 1,000 | 1,234 | 1.000 | 1.000 | - |"
    assert "; 8 x a GPU, " in fourth


def test_losses_are_compared_where_they_are_means_of_the_same_steps(tmp_path):
    rows = [
        trained("reference", [[10, 4.0], [14, 9.0], [20, 3.0], [30, 2.0]]),
        trained("kernel", [[10, 4.0], [20, 8.0], [30, 2.5]]),
    ]
    (tmp_path / "results").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "results" / "training.jsonl").write_text(lines)
    kernel = training_table(tmp_path).splitlines()[-2]
    assert kernel == "| kernel | 1,000 | 1,234 | 4.000 | 2.500 | +0.2500, +0.5000 |"
