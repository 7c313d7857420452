import json
import os
from statistics import median

import pytest
from rich.console import Console
from tests.train import tiny
from typer.testing import CliRunner

from nsa.bench import training
from nsa.bench.commands import bench_app
from nsa.bench.training import compare
from nsa.train.config import TrainConfig
from nsa.train.run import train


@pytest.fixture
def config(tmp_path):
    tiny.write_corpus(tmp_path / "text")
    return TrainConfig.from_dict(tiny.settings(tmp_path / "text", tmp_path / "unused"))


def run(config, tmp_path, *arms):
    output = tmp_path / "training.jsonl"
    console = Console(quiet=True)
    stopped = compare(
        config, "tiny", arms, folder=tmp_path / "runs", output=output, console=console
    )
    assert stopped is None
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_every_arm_that_runs_here_is_trained_on_the_same_text(config, tmp_path):
    sparse, dense = run(config, tmp_path)
    assert [sparse["arm"], dense["arm"]] == ["reference", "dense"]
    assert sparse["data"] == dense["data"]
    assert sparse["settings"] == dense["settings"]
    assert sparse["settings"]["training.learning_rate"] == 1e-2
    assert sparse["num_parameters"] > dense["num_parameters"]
    assert [step for step, _ in sparse["losses"]] == list(range(1, 7))
    assert sparse["losses"] != dense["losses"]
    assert sparse["tokens_per_second"] > 0
    assert sparse["steps"] == 6
    assert {"device", "torch", "commit", "command"} <= sparse.keys()
    assert not (tmp_path / "unused").exists()


def test_a_run_that_ended_is_not_trained_again(config, tmp_path):
    (first,) = run(config, tmp_path, "dense")
    _, again = run(config, tmp_path, "dense")
    assert again["losses"] == first["losses"]
    assert again["tokens_per_second"] == first["tokens_per_second"]


def test_a_run_that_was_stopped_leaves_no_row_and_goes_on_with_its_speed(
    config, tmp_path, monkeypatch
):
    from nsa.train import run as train_module

    class Stops(train_module.Milestones):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 5:
                control.should_save = control.should_training_stop = True

    output, console = tmp_path / "training.jsonl", Console(quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "Milestones", Stops)
        compare(config, "tiny", ["dense"], folder=tmp_path / "runs", output=output, console=console)
    assert not output.exists()
    (row,) = run(config, tmp_path, "dense")
    assert [step for step, _ in row["losses"]] == list(range(1, 7))
    kept = json.loads((tmp_path / "runs" / "tiny" / "dense" / "speed.json").read_text())
    assert len(kept) == 4  # All but the first of the process that took 5 steps.
    assert row["tokens_per_second"] == median(kept)


def test_of_several_processes_the_first_writes(config, tmp_path, monkeypatch):
    (row,) = run(config, tmp_path, "dense")
    assert row["num_processes"] == 1

    def trained(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.delenv("RANK")
            return train(*args, **kwargs)

    monkeypatch.setattr(training, "train", trained)
    monkeypatch.setenv("RANK", "1")
    assert run(config, tmp_path, "dense") == [row]
    monkeypatch.setenv("RANK", "0")
    assert len(run(config, tmp_path, "dense")) == 2


def test_the_reference_runs_where_kernels_would(config, tmp_path, monkeypatch):
    seen = []

    def trained(settings, **kwargs):
        seen.append((settings.model["attention"], os.environ.get("NSA_BACKEND")))
        raise InterruptedError

    monkeypatch.setattr(training, "train", trained)
    monkeypatch.setattr(training.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("NSA_BACKEND", "kernel")
    for arm in training.ARMS:
        with pytest.raises(InterruptedError):
            run(config, tmp_path, arm)
    assert seen == [("nsa", None), ("nsa", "reference"), ("dense", None)]
    assert os.environ["NSA_BACKEND"] == "kernel"


def test_the_command_takes_200_steps_unless_told(config, tmp_path, monkeypatch):
    path, seen = tmp_path / "small.yaml", []
    path.write_text(config.to_yaml())
    monkeypatch.setattr(
        training, "compare", lambda config, name, arms, **_: seen.append((config, name, arms))
    )
    for given in ([], ["--set", "training.max_steps=7", "--arm", "dense"]):
        done = CliRunner().invoke(bench_app, ["training", str(path), *given])
        assert done.exit_code == 0, done.output
    assert [(made.training.max_steps, name, list(arms)) for made, name, arms in seen] == [
        (200, "small", []),
        (7, "small", ["dense"]),
    ]


def test_arms_that_do_not_run_here_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="--arm: expected one of reference, dense here, got 'ker"):
        run(config, tmp_path, "kernel")
