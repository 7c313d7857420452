import io
import json

import pytest
import torch
from rich.console import Console

from nsa.bench.correctness import WrongResultError
from nsa.bench.run import Plan
from nsa.bench.split import kernel_times, split, split_and_report

CPU = torch.device("cpu")


def plan(**changes):
    asked = {"operations": ("window_attention",), "providers": ("sdpa",), "workloads": ("local",)}
    return Plan(device=CPU, quick=True, **{**asked, **changes})


def test_times_are_of_one_call_and_the_longest_first():
    a, b = torch.randn(400, 400), torch.randn(8, 8)
    found = {item.kernel: item for item in kernel_times(lambda: (a @ a, b + b, b + b), CPU)}
    assert found["aten::mm"].calls == 1
    assert found["aten::add"].calls == 2
    assert found["aten::mm"].ms > found["aten::add"].ms > 0
    order = [item.ms for item in found.values()]
    assert order == sorted(order, reverse=True)


def test_a_row_is_one_kernel_of_a_checked_case():
    asked = plan()
    rows = list(split(asked, asked.cases()))
    assert {row["mode"] for row in rows} == {"forward", "backward"}
    for row in rows:
        assert row["shape"] == "tiny"
        assert row["error"] < 1e-5
        assert row["torch"] == torch.__version__
        json.dumps(row)
    forward = {row["kernel"] for row in rows if row["mode"] == "forward"}
    assert any("scaled_dot_product" in name for name in forward)


def test_a_wrong_case_is_not_split(monkeypatch, tmp_path):
    def wrong(*_):
        raise WrongResultError("off by one")

    monkeypatch.setattr("nsa.bench.run.check", wrong)
    output = tmp_path / "kernels.jsonl"
    with pytest.raises(WrongResultError):
        split_and_report(plan(), output, Console(file=io.StringIO()))
    assert not output.exists()


def test_the_table_has_shares_that_add_up(tmp_path):
    output, console = tmp_path / "kernels.jsonl", Console(file=io.StringIO(), width=120)
    split_and_report(plan(modes=("forward",)), output, console)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    text = console.file.getvalue()
    assert "window_attention forward sdpa 256 local" in text
    shares = [float(word.rstrip("%")) for word in text.split() if word.endswith("%")]
    assert len(shares) == len(rows)
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(rows))


def test_a_combination_that_nobody_offers_is_refused(tmp_path):
    asked = plan(operations=("compress_kv",))
    with pytest.raises(ValueError, match="expected a provider that offers the operation"):
        split_and_report(asked, tmp_path / "kernels.jsonl", Console())
