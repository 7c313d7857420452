"""Runs that start from the weights of another model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.train import tiny
from transformers import AutoModelForCausalLM

from nsa.layers import NativeSparseAttention
from nsa.train.config import TrainConfig, load_config
from nsa.train.run import TrainResult, train
from nsa.train.start import new_model

QUIET = Console(quiet=True)


def test_a_run_starts_from_another_model(
    finished: TrainResult, corpus: Path, tmp_path: Path
) -> None:
    first = shutil.copytree(finished.model_dir, tmp_path / "first")
    training = {"initial_model": str(first), "learning_rate": 1e-12, "warmup_steps": 0}
    values = tiny.settings(corpus, tmp_path / "next", **training)
    values["model"] = {}
    values["tokenizer"] = {"load": str(first)}
    result = train(TrainConfig.from_dict(values), console=QUIET)
    assert result.validation.loss == pytest.approx(finished.validation.loss, abs=1e-4)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (first, result.model_dir)
    )
    assert after.config.to_diff_dict() == before.config.to_diff_dict()
    assert load_config(tmp_path / "next" / "config.yaml").model["hidden_size"] == 16

    # The first model is not needed to go on.
    shutil.rmtree(first)
    values["training"]["max_steps"] = 8
    assert train(TrainConfig.from_dict(values), resume=True, console=QUIET).step == 8


@pytest.mark.parametrize(
    ("model", "change", "error", "message"),
    [
        ({}, "gone", FileNotFoundError, "found no config.json"),
        (
            {"hidden_size": 32},
            None,
            ValueError,
            r"weights differ: \d+ of them \(lm_head.weight, \.\.\.\)\. Le",
        ),
    ],
    ids=["no-folder", "other-shapes"],
)
def test_an_initial_model_that_does_not_fit(
    finished: TrainResult, corpus: Path, tmp_path: Path, model, change, error, message
) -> None:
    first = tmp_path / change if change else finished.model_dir
    values = tiny.settings(corpus, tmp_path / "next", initial_model=str(first))
    values["model"] = model
    values["tokenizer"] = {"load": str(finished.model_dir)}
    with pytest.raises(error, match=message):
        train(TrainConfig.from_dict(values), console=QUIET)


def test_an_initial_model_of_another_tokenizer(
    finished: TrainResult, corpus: Path, tmp_path: Path
) -> None:
    first = finished.model_dir
    values = tiny.settings(corpus, tmp_path / "next", initial_model=str(first))
    # As many tokens, learned from other text.
    values["data"]["train"] = [str(tmp_path / "other.txt")]
    (tmp_path / "other.txt").write_text("to be or not to be, that is the question " * 50)
    with pytest.raises(ValueError, match=rf"initial_model: .* Set tokenizer\.load={first}\."):
        train(TrainConfig.from_dict(values), console=QUIET)
    assert not (tmp_path / "next" / "tokens").exists()


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("begin", ["random", "initial", "resumed"])
def test_recomputing_reaches_every_layer(
    begin: str, recompute: bool, finished: TrainResult
) -> None:
    overrides = [f"training.recompute_branches={recompute}"]
    if begin == "random":
        overrides += ["model.num_hidden_layers=3"]
    if begin == "initial":
        overrides += [f"training.initial_model={finished.model_dir}"]
    config = load_config(finished.output_dir / "config.yaml", overrides)
    model = new_model(config, resuming=begin == "resumed")
    found = [x.recompute for x in model.modules() if isinstance(x, NativeSparseAttention)]
    assert found == [recompute] * (3 if begin == "random" else 1)


def test_recomputing_changes_nothing_in_a_dense_twin(finished: TrainResult) -> None:
    overrides = ["training.recompute_branches=true", "model.attention=dense"]
    config = load_config(finished.output_dir / "config.yaml", overrides)
    modules = list(new_model(config, resuming=False).modules())
    assert not any(isinstance(x, NativeSparseAttention) or hasattr(x, "recompute") for x in modules)


def test_a_run_made_before_a_setting_existed_goes_on(
    finished: TrainResult, corpus: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(finished.output_dir, tmp_path / "old")
    lines = (run_dir / "config.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "recompute_branches" not in line]
    assert len(kept) == len(lines) - 1
    (run_dir / "config.yaml").write_text("".join(kept))
    assert train(tiny.config(corpus, run_dir), resume=True, console=QUIET).step == 6
    (run_dir / "config.yaml").write_text("".join(kept[:-1]))
    with pytest.raises(ValueError, match=r"but training\.num_workers is not in it"):
        train(tiny.config(corpus, run_dir), resume=True, console=QUIET)
