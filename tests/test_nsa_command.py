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

# Where the tests run in the background, Ctrl-C is ignored from the start.
SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from nsa_command import main
main()
"""


def start(*command: str, **options: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


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


def test_ctrl_c_in_training_saves_and_says_how_to_go_on(tmp_path):
    tiny.write_corpus(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny.settings(tmp_path, Path("run"), max_steps=100_000)))
    with start(sys.executable, "-c", SCRIPT, "train", str(config), cwd=tmp_path) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("step 1/"))
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopping after this step" in shown
    step = re.findall(r"^step (\d+)/", "step 1/\n" + shown, re.MULTILINE)[-1]
    assert (tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors").is_file()
    assert shown.endswith("Go on with the same command and --resume.\n")
    assert errors == "Interrupted.\n"
