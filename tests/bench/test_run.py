import io
import json

import pytest
import torch
from rich.console import Console

from nsa.bench import run
from nsa.bench.correctness import WrongResultError
from nsa.bench.operations import OPERATIONS
from nsa.bench.run import Case, Plan, measure, run_and_report

CPU = torch.device("cpu")


def plan(**changes):
    return Plan(device=CPU, quick=True, **changes)


def test_a_quick_plan_on_the_cpu_covers_every_operation_and_mode():
    cases = plan().cases()
    assert {case.operation for case in cases} == set(OPERATIONS) - {"recompute_pipeline"}
    assert {case.provider for case in cases} == {"reference", "sdpa"}
    assert {case.workload for case in cases} == {"random", "local"}
    assert {case.seq_len for case in cases} == {256}
    assert len(cases) == len(set(cases))


def test_recomputing_is_measured_only_if_asked_for():
    assert {case.operation for case in plan(operations=("recompute_pipeline",)).cases()} == {
        "recompute_pipeline"
    }


def test_a_plan_narrows_to_what_is_asked_for():
    asked = plan(operations=("window_attention",), modes=("backward",), workloads=("local",))
    assert asked.cases() == [
        Case("window_attention", "backward", provider, 256, "local")
        for provider in ("reference", "sdpa")
    ]


def test_on_cuda_the_reference_is_measured_only_if_asked_for():
    cuda = torch.device("cuda")
    providers = {case.provider for case in Plan(device=cuda).cases()}
    assert providers - {"fla"} == {"kernel", "sdpa", "cudnn", "flash", "flex"}
    asked = Plan(device=cuda, providers=("reference",), operations=("pipeline",)).cases()
    assert {case.provider for case in asked} == {"reference"}


def test_lengths_that_a_provider_cannot_do_are_left_out():
    asked = plan(providers=("sdpa",), operations=("window_attention",), seq_lens=(256, 16384))
    assert {case.seq_len for case in asked.cases()} == {256}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compressors": ("gated",)}, "compressor: expected one of mlp, mean, got 'gated'"),
        ({"operations": ("windows",)}, "operation: expected one of compress_kv, .*, got 'windows'"),
        ({"providers": ("flax",)}, "provider: expected one of reference, .*, got 'flax'"),
        ({"workloads": ("trace:a", "trace:b")}, "workload: expected at most one trace:FILE"),
        ({"workloads": ("trace:a",), "shape": "tiny"}, "workload: expected .* no shape"),
        ({"modes": ("both",)}, "mode: expected one of forward, backward, got 'both'"),
        ({"workloads": ("iid",)}, "workload: expected one of random, local, got 'iid'"),
        ({"shape": "big"}, "shape: expected one of tiny, laptop, .*, got 'big'"),
        ({"dtype": "fp32"}, "dtype: expected one of float32, .*, got 'fp32'"),
        ({"providers": ("kernel",)}, "provider: kernel runs on cuda, but the device is cpu"),
        ({"graph": True}, "graph: expected a GPU, got cpu"),
        ({"seq_lens": (8,)}, "seq_len: expected at least one compressed block = 16 tokens, got 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unknown_names_are_refused_with_those_known(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_a_row_has_the_case_numbers_and_provenance():
    asked = plan(operations=("selected_attention",), workloads=("local",), seq_lens=(200,))
    rows = list(measure(asked, asked.cases()))
    assert len(rows) == 4
    for row in rows:
        assert row["seq_len"] == 200
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert 0.5 < row["overlap"] <= 1
        assert row["error"] < 1e-5
        assert row["flops"] > 0
        assert row["bytes"] > 0
        assert row["torch"] == torch.__version__
        assert row["quick"] is True
        json.dumps(row)
        assert (row["kept_memory_bytes"] is None) == (row["mode"] == "forward")


def test_rows_of_a_backward_say_what_is_kept_for_it():
    asked = plan(
        operations=("pipeline", "recompute_pipeline", "dense_attention"),
        modes=("backward",),
        workloads=("local",),
        compressors=("mean",),
    )
    rows = {row["operation"]: row for row in measure(asked, asked.cases())}
    shape, kept = asked.resolve_shape(), {name: rows[name]["kept_memory_bytes"] for name in rows}
    o = 256 * shape.num_heads * shape.value_dim * 4
    assert kept["pipeline"] - kept["recompute_pipeline"] == 3 * o
    assert 2 * o < kept["dense_attention"] < kept["recompute_pipeline"]


def test_both_compressors_are_measured_where_they_make_a_difference():
    asked = plan(operations=("pipeline", "nsa_attention", "shared_pipeline"), modes=("forward",))
    kinds = {(case.operation, case.compressor) for case in asked.cases()}
    assert kinds == {
        ("pipeline", "mlp"),
        ("pipeline", "mean"),
        ("nsa_attention", None),
        ("shared_pipeline", "mean"),
    }
    one = plan(operations=("pipeline",), compressors=("mean",)).cases()
    assert {case.compressor for case in one} == {"mean"}


def test_a_row_says_which_compressor_and_which_geometry():
    asked = plan(
        operations=("pipeline", "shared_pipeline"),
        workloads=("local",),
        modes=("backward",),
        compressors=("mean",),
    )
    whole, shared = measure(asked, asked.cases())
    assert whole["compressor"] == shared["compressor"] == "mean"
    assert whole["geometry"] == [16, 8, 16, 8, 1, 2, 64]
    assert shared["geometry"] == [16, 16, 16, 8, 1, 2, 64]


def test_a_case_is_checked_once_for_all_lengths(monkeypatch):
    checks = []
    monkeypatch.setattr(run, "check", lambda *args: checks.append(args) or 0.0)
    asked = plan(operations=("window_attention",), providers=("reference",), seq_lens=(64, 96))
    assert len(list(measure(asked, asked.cases()))) == 8
    assert len(checks) == 4


def failing(error):
    def check(provider, operation, mode, *_):
        if provider.name == "sdpa":
            raise error
        return 0.0

    return check


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        pytest.param(WrongResultError("off by one"), "wrong result: off by one", id="wrong"),
        pytest.param(NotImplementedError("no kernel"), "not offered: no kernel", id="missing"),
        pytest.param(torch.OutOfMemoryError(), "out of memory", id="memory"),
        pytest.param(RuntimeError("No kernel.\nMore"), "failed: No kernel.", id="refused"),
    ],
)
def test_a_provider_with_a_problem_gets_no_numbers(monkeypatch, tmp_path, error, problem):
    monkeypatch.setattr(run, "check", failing(error))
    asked = plan(operations=("window_attention",), modes=("forward",), workloads=("local",))
    right, wrong = measure(asked, asked.cases())
    assert wrong["problem"] == problem
    assert "p50_ms" not in wrong
    assert "problem" not in right

    output, console = tmp_path / "ops.jsonl", Console(file=io.StringIO())
    assert run_and_report(asked, output, console) is False
    assert [json.loads(line)["provider"] for line in output.read_text().splitlines()] == [
        "reference"
    ]
    shown = console.file.getvalue()
    assert f"window_attention forward sdpa 256 local: {problem}" in shown
    assert "1 of 2 measured" in shown


def test_rows_measured_before_an_interruption_are_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "check", failing(KeyboardInterrupt()))
    asked = plan(operations=("window_attention",), modes=("forward",), workloads=("local",))
    output = tmp_path / "ops.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_and_report(asked, output, Console(file=io.StringIO()))
    assert len(output.read_text().splitlines()) == 1


def test_a_combination_that_nobody_offers_is_refused(tmp_path):
    asked = plan(operations=("dense_attention",), providers=("reference",))
    with pytest.raises(ValueError, match="expected a provider that offers the operation"):
        run_and_report(asked, tmp_path / "ops.jsonl", Console())
