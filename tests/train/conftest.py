"""The corpus of the tests of training, and a run over it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from tests.train import tiny

from nsa.train.run import TrainResult, train


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tiny.write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run of six steps that nothing disturbed. Tests copy its folder before changing it."""
    run_dir = tmp_path_factory.mktemp("run") / "a"
    return train(tiny.config(corpus, run_dir), console=Console(quiet=True))
