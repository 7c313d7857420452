"""The commands of this layer, as typed; ``ops`` and ``plot`` also in ``tests/test_cli.py``."""

import json

import pytest
from tests.models.small import small_model
from tests.models.tokenizer import character_tokenizer
from typer.testing import CliRunner

from nsa.bench.commands import bench_app


def run(*arguments):
    done = CliRunner().invoke(bench_app, [str(part) for part in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    small_model().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    (tmp_path / "text.txt").write_text("Call me Ishmael. " * 20, encoding="utf-8")
    return folder


def test_split_prints_kernels_and_appends_rows(tmp_path):
    output = tmp_path / "kernels.jsonl"
    small = ("--shape", "tiny", "--device", "cpu", "--operation", "window_attention")
    printed = run("split", *small, "--output", output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["seq_len"] for row in rows} == {256}
    assert {row["provider"] for row in rows} == {"reference"}
    assert "window_attention backward reference 256 local" in " ".join(printed.split())


def test_a_trace_is_written_and_measured(model, tmp_path):
    trace, output = tmp_path / "trace.safetensors", tmp_path / "ops.jsonl"
    written = run(
        "trace", model, tmp_path / "text.txt", "--output", trace, "--layer", 1, "--device", "cpu"
    )
    assert "Read 340 tokens." in written
    only = ("--operation", "pipeline", "--mode", "forward", "--compressor", "mlp")
    run(
        "ops", "--workload", f"trace:{trace}", *only, "--device", "cpu", "--quick",
        "--output", output,
    )  # fmt: skip
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    assert (row["workload"], row["seq_len"], row["compressor"]) == ("trace", 340, "mlp")


def test_tuning_needs_a_gpu():
    with pytest.raises(ValueError, match="device: expected a GPU, got cpu"):
        run("tune", "--device", "cpu")


def test_the_speedup_of_measured_rows_is_drawn(tmp_path):
    output, picture = tmp_path / "ops.jsonl", tmp_path / "speedup.svg"
    for operation, provider in (("pipeline", "reference"), ("dense_attention", "sdpa")):
        only = ("--operation", operation, "--provider", provider, "--mode", "forward")
        run("ops", "--quick", "--device", "cpu", *only, "--output", output)
    run("plot", "--speedup", "--results", output, "--output", picture)
    assert "<svg" in picture.read_text()
