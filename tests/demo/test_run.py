from __future__ import annotations

import errno
import io
import json
import math
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.browser import WIDTHS, Browser, browser  # noqa: F401
from typer.testing import CliRunner

from nsa import cli
from nsa.config import NSAConfig
from nsa.demo import DemoDidNotLearn, DemoSettings, DemoStopped, run_demo
from nsa.demo import run as demo_run
from nsa.demo.run import unigram_entropy
from nsa.train.checkpoint import CheckpointError
from nsa.train.engine import NSATrainer
from nsa.train.progress import ProgressReport

SMALL = DemoSettings(
    geometry=NSAConfig(
        compress_block_size=8,
        compress_stride=4,
        block_size=8,
        num_selected_blocks=4,
        window_size=8,
    ),
    vocab_size=300,
    seq_len=64,
    hidden_size=32,
    num_layers=2,
    max_steps=6,
    batch_rows=2,
    eval_every=3,
    train_chars=20_000,
    held_out_chars=3_000,
    sample_tokens=8,
    min_gain=None,
)


def run(folder: Path) -> str:
    """Runs the small demo; returns what was on the screen."""
    screen = io.StringIO()
    run_demo(folder, settings=SMALL, console=Console(file=screen, width=120))
    return screen.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(folder)


def test_every_step_is_on_the_screen(done):
    _, screen = done
    assert [int(n) for n in re.findall(r"^\[(\d)/5\]", screen, re.MULTILINE)] == [1, 2, 3, 4, 5]
    assert "step 6/6" in screen
    assert "CHAPTER 133. The Chase--First Day." in screen
    assert "8 tokens in" in screen
    assert "report.html" in screen


def test_the_command_to_try_can_be_typed_as_it_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/there/.venv/bin/python")
    assert demo_run._command() == "/there/.venv/bin/nsa"
    (tmp_path / "nsa").touch(mode=0o755)
    assert demo_run._command() == "nsa"


def test_report_holds_the_numbers_of_the_runs(done):
    folder, screen = done
    report = (folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r"nsa ([\d.]+), dense ([\d.]+) \(nsa ([-+][\d.]+)\)", screen)
    assert found is not None
    losses = {}
    for name, shown in zip(("nsa", "dense"), found.groups()[:2], strict=True):
        history = json.loads((folder / name / "history.json").read_text(encoding="utf-8"))
        losses[name] = [e["eval_loss"] for e in history if "eval_loss" in e]
        assert len(losses[name]) == 2
        assert float(shown) == pytest.approx(losses[name][-1], abs=6e-4)
        assert f"{float(shown):.3f}<small>" in report
    assert f"{found[3]}<small>nats per token" in report
    charts = [
        json.loads(text)
        for text in re.findall(r"<figure data-chart><script[^>]*>(.*?)</script>", report)
    ]
    assert [chart["series"][0]["name"] for chart in charts] == ["NSA", "NSA", "NSA"]
    assert charts[1]["x"] == [3, 6]
    assert charts[1]["series"][1]["values"] == pytest.approx(losses["dense"])
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for name, twin in results["twins"].items():
        assert twin["loss"] == pytest.approx(losses[name][-1])
        assert twin["tokens_per_second"] > 0
    assert results["train_tokens"] == 6 * 2 * 64
    assert results["seconds"] > 0
    assert results["torch"] == torch.__version__


def test_report_works_offline_at_both_widths(done, browser):  # noqa: F811
    for width in WIDTHS:
        browser.open(done[0] / "report.html", width=width)
        browser.wait("document.querySelector('[data-inspector]').dataset.ready")
        browser.settle()
        assert browser.log() == []
        assert browser.overflow() <= 0
        assert browser.js("return document.querySelectorAll('.chart svg path').length") > 6
        assert len(browser.js("return document.querySelectorAll('.sample')")) == 2


def test_running_again_trains_nothing_anew(done):
    folder, _ = done
    before = {
        name: (folder / name / "model" / "model.safetensors").read_bytes()
        for name in ("nsa", "dense")
    }
    speed = (folder / "nsa" / "speed.json").read_text(encoding="utf-8")
    screen = run(folder)
    assert "step 1/6" not in screen
    assert (folder / "nsa" / "speed.json").read_text(encoding="utf-8") == speed
    for name, weights in before.items():
        assert (folder / name / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("stopped", ["nsa", "dense"])
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(done, tmp_path, monkeypatch, stopped):
    real = ProgressReport.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == 2 and Path(args.output_dir).name == stopped:
            signal.raise_signal(signal.SIGINT)

    screen = io.StringIO()
    monkeypatch.setattr(ProgressReport, "on_step_end", interrupt)
    with pytest.raises(DemoStopped) as caught:
        run_demo(tmp_path, settings=SMALL, console=Console(file=screen, width=500))
    monkeypatch.setattr(ProgressReport, "on_step_end", real)
    assert caught.value.signal_number == signal.SIGINT
    assert f"What is done is in {tmp_path}. The same command goes on" in screen.getvalue()
    assert "--resume" not in screen.getvalue()
    assert not (tmp_path / "report.html").exists()
    screen_after = run(tmp_path)
    assert screen_after.count("step 1/6") == (1 if stopped == "nsa" else 0)
    for name in ("nsa", "dense"):
        finals = [
            json.loads((folder / name / "history.json").read_text(encoding="utf-8"))
            for folder in (done[0], tmp_path)
        ]
        losses = [[e["eval_loss"] for e in history if "eval_loss" in e] for history in finals]
        assert losses[0] == losses[1]
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["seconds"] is None


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path, monkeypatch):
    def full(trainer, output_dir=None, _internal_call=False):
        raise OSError(errno.ENOSPC, "No space left on device")

    screen = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(NSATrainer, "save_model", full)
        with pytest.raises(CheckpointError, match="the disk is full; there is no earlier"):
            run_demo(tmp_path, settings=SMALL, console=Console(file=screen, width=500))
    assert "The same command goes on from there" in screen.getvalue()
    assert "report.html" in run(tmp_path)


def test_other_settings_do_not_overwrite_a_demo(done):
    other = replace(SMALL, num_layers=1)
    with pytest.raises(ValueError, match=r"num_hidden_layers \(was 2, is 1\)"):
        run_demo(done[0], settings=other, console=Console(file=io.StringIO()))


def test_a_model_that_did_not_learn_is_a_failure_with_a_report(done):
    folder, screen = done
    assert "The sparse model: its held-out loss of" in screen
    (folder / "report.html").unlink()
    asked = replace(SMALL, min_gain=1.0)
    with pytest.raises(DemoDidNotLearn, match=r"did not learn: .*expected at least 1\.000 under"):
        run_demo(folder, settings=asked, console=Console(file=io.StringIO()))
    assert "The sparse model did not learn" in (folder / "report.html").read_text(encoding="utf-8")
    run(folder)
    assert DemoSettings().min_gain == 1.0


def test_command_fails_if_the_model_did_not_learn(monkeypatch):
    def fail(folder):
        raise DemoDidNotLearn("The sparse model did not learn.")

    monkeypatch.setattr("nsa.demo.run_demo", fail)
    failed = CliRunner().invoke(cli.app, ["demo"])
    assert failed.exit_code == 1
    assert failed.stderr == "Error: The sparse model did not learn.\n"


def test_unigram_entropy_of_known_counts():
    # The first token of each document is given, not predicted: a, a, b, c remain.
    documents = [[9, 0, 0, 1], [9, 2]]
    expected = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert unigram_entropy(documents) == pytest.approx(expected)


def test_command_ends_like_a_program_that_was_interrupted(monkeypatch):
    def stop(folder):
        raise DemoStopped(signal.SIGINT)

    monkeypatch.setattr("nsa.demo.run_demo", stop)
    assert CliRunner().invoke(cli.app, ["demo"]).exit_code == 130
