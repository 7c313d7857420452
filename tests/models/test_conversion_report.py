"""The measures by hand on models that return given logits, and what the tables show."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from nsa.models.conversion_report import ConversionReport, LogitShift, measure_shift


class Fixed(torch.nn.Module):
    """Returns the same logits at every position."""

    device = torch.device("cpu")

    def __init__(self, *logits: float):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids, use_cache):
        assert not self.training
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


TOKENS = torch.zeros(301, dtype=torch.int64)


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(2, id="shortest"),
        pytest.param(128, id="one-piece"),
        pytest.param(129, id="last-token-alone"),
        pytest.param(301, id="pieces"),
    ],
)
def test_measures_by_hand(length):
    shift = measure_shift(Fixed(0.0, 0.0), Fixed(math.log(3.0), 0.0), TOKENS[:length])
    assert shift.num_tokens == length
    assert shift.max_change == pytest.approx(math.log(3))
    assert shift.mean_change == pytest.approx(math.log(3) / 2)
    assert shift.loss_before == pytest.approx(math.log(2))
    assert shift.loss_after == pytest.approx(math.log(4 / 3))
    # KL of (1/2, 1/2) from (3/4, 1/4), not the other way round.
    assert shift.kl == pytest.approx(0.5 * math.log(4 / 3))


def test_equal_models_do_not_move():
    shift = measure_shift(Fixed(0.3, 1.7), Fixed(0.3, 1.7), TOKENS)
    assert (shift.max_change, shift.mean_change, shift.kl) == (0.0, 0.0, 0.0)
    assert shift.loss_before == shift.loss_after


def test_the_mode_of_a_model_is_restored():
    training, evaluating = Fixed(0.0, 1.0).train(), Fixed(0.0, 1.0).eval()
    measure_shift(training, evaluating, TOKENS)
    assert training.training
    assert not evaluating.training


def test_tables_group_layers():
    report = ConversionReport(
        architecture="LlamaForCausalLM",
        copied={f"model.layers.{i}.mlp.up_proj.weight": "the dense weights" for i in range(12)},
        initialised={"model.layers.0.self_attn.gate_mlp.2.weight": "zeros"},
        exact_tokens=1024,
        shift=LogitShift(40, 0.25, 0.125, 0.0625, 2.5, 2.75),
    )
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report)
    lines = console.export_text().splitlines()
    for words in (
        ["mlp.up_proj.weight", "12", "the dense weights"],
        ["self_attn.gate_mlp.2.weight", "1", "zeros"],
        ["dense model", "2.5000 nats/token"],
        ["converted model", "2.7500 nats/token"],
        ["KL", "6.25e-02"],
        ["largest", "2.50e-01"],
        ["mean", "1.25e-01"],
        ["selection", "1,024 tokens"],
    ):
        assert any(all(word in line for word in words) for line in lines), words
