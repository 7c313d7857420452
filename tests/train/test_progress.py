"""What the callbacks tell the loop and the person."""

from __future__ import annotations

import io
import os
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tests.disk import full_disk
from transformers import TrainerControl, TrainerState, TrainingArguments

from nsa.train.progress import EventFiles, Milestones, ProgressReport, StopOnSignal

ARGS = SimpleNamespace(device=torch.device("cpu"))


def _console(*, terminal: bool = False, width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=width, highlight=False), out


def _state(step: int, max_steps: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps, is_world_process_zero=True)


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "bar"])
def test_report_shows_losses_and_rate(terminal: bool) -> None:
    console, out = _console(terminal=terminal)
    report = ProgressReport(console, lambda step: 100 + step)
    control = TrainerControl()
    report.on_train_begin(ARGS, _state(0), control)
    for step in (1, 2):
        report.on_step_end(ARGS, _state(step), control)
    assert report._tokens == 100 + 101
    report.on_log(ARGS, _state(2), control, logs={"loss": 1.25, "learning_rate": 1e-3})
    assert report._tokens == 0
    report.on_log(ARGS, _state(2), control, logs={"eval_loss": 1.5, "eval_tokens": 1234})
    report.on_log(ARGS, _state(2), control, logs={"train_runtime": 1.0})
    report.close()
    shown = out.getvalue()
    assert "validation loss 1.5000  (1,234 tokens)" in shown
    assert "loss 1.2500" in shown
    assert "tokens/s" in shown
    assert ("step 2/10  loss" in shown) != terminal
    assert "2/10" in shown
    assert "train_runtime" not in shown


def test_report_shows_validation_losses_by_position_at_the_end() -> None:
    console, out = _console()
    report = ProgressReport(console, lambda step: 1)
    logs = {"eval_loss": 1.5, "eval_tokens": 99, "eval_loss_at/1-63": 2.0, "eval_loss_at/64-99": 1}
    report.on_log(ARGS, _state(9), TrainerControl(), logs=logs)
    assert "positions" not in out.getvalue()
    report.on_log(ARGS, _state(10), TrainerControl(), logs=logs)
    assert out.getvalue().endswith("validation loss at positions 1-63 2.0000,  64-99 1.0000\n")


def test_report_of_another_process_is_silent() -> None:
    console, out = _console(terminal=True)
    report = ProgressReport(console, lambda step: 1)
    state = TrainerState(global_step=1, max_steps=2, is_world_process_zero=False)
    report.on_train_begin(ARGS, state, TrainerControl())
    report.on_log(ARGS, state, TrainerControl(), logs={"loss": 1.0, "learning_rate": 1.0})
    assert out.getvalue() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signal_saves_and_stops_after_the_step(number: int) -> None:
    console, out = _console()
    stop = StopOnSignal(console)
    before = signal.getsignal(number)
    with stop.listening():
        control = stop_control = TrainerControl()
        stop.on_step_end(ARGS, _state(1), control)
        assert not stop_control.should_training_stop
        signal.raise_signal(number)
        stop.on_step_end(ARGS, _state(2), control)
    assert control.should_save
    assert control.should_log
    assert control.should_training_stop
    assert stop.signal_number == number
    assert "Stopping after this step" in out.getvalue()
    assert signal.getsignal(number) is before


def test_workers_that_inherit_the_handler_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    console, out = _console()
    stop = StopOnSignal(console)
    with stop.listening(), monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)  # as in a process that was forked
        signal.raise_signal(signal.SIGINT)
    assert stop.signal_number == signal.SIGINT
    assert out.getvalue() == ""


def test_second_ctrl_c_does_not_wait() -> None:
    stop = StopOnSignal(_console()[0])
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def listen() -> None:
        with StopOnSignal(_console()[0]).listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("call", ["on_train_begin", "on_log", "on_train_end"])
def test_event_files_that_cannot_be_written_are_done_without(
    call: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    console, out = _console(width=1000)  # Room for the folder's name.
    events = EventFiles(tmp_path / "tensorboard", console)
    args, control = TrainingArguments(output_dir=str(tmp_path)), TrainerControl()
    for name in ("on_train_begin", "on_log", "on_log", "on_train_end"):
        with full_disk() if name == call else nullcontext():
            getattr(events, name)(args, _state(1), control, logs={"a" * 200: 1.0})
    shown = out.getvalue()
    assert shown.count("tensorboard: no further event files") == (call != "on_train_end")
    assert capfd.readouterr().err == ""


def _flags(milestones: Milestones, step: int) -> str:
    control = TrainerControl()
    milestones.on_step_end(ARGS, _state(step), control)
    flags = {
        "log": control.should_log,
        "eval": control.should_evaluate,
        "save": control.should_save,
        "stop": control.should_training_stop,
    }
    return " ".join(name for name, value in flags.items() if value)


def test_milestones() -> None:
    milestones = Milestones(log_every=4, save_every=3, eval_every=5, validates=True)
    assert [_flags(milestones, step) for step in range(1, 11)] == [
        "log",
        "",
        "log save",
        "log",
        "eval",
        "log save",
        "",
        "log",
        "log save",
        "log eval save stop",
    ]


def test_milestones_without_validation_or_interval() -> None:
    never = Milestones(log_every=100, save_every=100, eval_every=1, validates=False)
    assert [_flags(never, step) for step in (2, 10)] == ["", "log save stop"]
    only_at_end = Milestones(log_every=100, save_every=100, eval_every=0, validates=True)
    assert [_flags(only_at_end, step) for step in (2, 10)] == ["", "log eval save stop"]
