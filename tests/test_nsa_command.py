"""The script itself, in a process of its own, with real signals."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.train import tiny

import nsa_command
from nsa import cli
from nsa.train import checkpoint

# Where the tests run in the background, Ctrl-C is ignored from the start.
SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from nsa_command import main
main()
"""


def start(*command: str, **options: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **(pipes | options))


def test_ctrl_c_while_torch_is_imported():
    with start(sys.executable, "-X", "importtime", "-c", SCRIPT, "--version") as process:
        assert process.stderr is not None
        next(line for line in process.stderr if re.search(r"\| +torch\.", line))
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert (process.returncode, "".join(rest)) == (130, "Interrupted.\n")


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_commands_run_under_the_handler_that_was_there(monkeypatch, handler):
    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(signal.getsignal(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, handler)
    try:
        nsa_command.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [handler]


def start_training(
    folder: Path, *, stderr: int = subprocess.PIPE, **training: object
) -> subprocess.Popen[str]:
    """A tiny run in ``folder / "run"``, at its first step."""
    tiny.write_corpus(folder)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tiny.settings(folder, Path("run"), **training)))
    process = start(sys.executable, "-c", SCRIPT, "train", str(config), cwd=folder, stderr=stderr)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step 1/"))
    return process


def test_ctrl_c_in_training_saves_and_says_how_to_go_on(tmp_path):
    with start_training(tmp_path, max_steps=100_000) as process:
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopping after this step" in shown
    step = re.findall(r"^step (\d+)/", "step 1/\n" + shown, re.MULTILINE)[-1]
    assert (tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors").is_file()
    assert shown.endswith("Go on with the same command and --resume.\n")
    assert errors == "Interrupted.\n"


def test_training_goes_on_when_nobody_reads_its_output(tmp_path):
    with start_training(tmp_path, max_steps=20) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert errors == "Nobody reads the output any more. The run goes on without it.\n"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_ctrl_c_that_ended_tee_too_still_saves(tmp_path):
    settings = {"max_steps": 100_000, "save_every": 100_000}
    with start_training(tmp_path, stderr=subprocess.STDOUT, **settings) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    ((_, saved),) = checkpoint.list_checkpoints(tmp_path / "run")
    assert checkpoint.damage(saved) is None
