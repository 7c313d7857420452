"""Runs that start from the weights of another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from tests.train import tiny
from transformers import AutoModelForCausalLM

from nsa.train.config import TrainConfig
from nsa.train.run import TrainResult, train

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tiny.write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(tiny.config(corpus, tmp_path_factory.mktemp("run") / "a"), console=QUIET)


def test_a_run_starts_from_another_model(
    finished: TrainResult, corpus: Path, tmp_path: Path
) -> None:
    first = finished.model_dir
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

    # The first model is not needed to go on.
    values["training"] |= {"initial_model": str(tmp_path / "gone"), "max_steps": 8}
    saved = yaml.safe_load((tmp_path / "next/config.yaml").read_text())
    saved["training"]["initial_model"] = str(tmp_path / "gone")
    (tmp_path / "next/config.yaml").write_text(yaml.safe_dump(saved))
    assert train(TrainConfig.from_dict(values), resume=True, console=QUIET).step == 8


@pytest.mark.parametrize(
    ("model", "change", "error", "message"),
    [
        ({}, "gone", FileNotFoundError, "found no config.json"),
        ({"hidden_size": 32}, None, ValueError, "their weights differ"),
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
