"""The command line: what users see, what goes wrong, and that help is quick."""

import io
import json
import os
import subprocess
import sys
from logging import StreamHandler

import pytest
import torch
from tests.models.small import small_model
from tests.models.tokenizer import character_tokenizer
from transformers.utils import logging

import nsa
from nsa import cli
from nsa.serve import text
from nsa.serve.text import Generation


def run(monkeypatch, *arguments):
    """Runs ``nsa ARGUMENTS`` in this process and returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["nsa", *arguments])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return leaving.value.code or 0


class FakeModel:
    """Stands where a loaded model would: remembers what it was asked and answers with two words."""

    def __init__(self):
        self.asked = []
        self.tokenizer = type("Tokenizer", (), {"chat_template": None})()

    def stream(self, prompt, *, on_text, **options):
        self.asked.append((prompt, options))
        on_text("two ")
        on_text("words")
        return Generation("two words", 3, 2, 0.5)

    def room(self, prompt, max_new_tokens):
        return max(0, 40 - len(prompt))


@pytest.fixture
def model(monkeypatch):
    made = FakeModel()
    monkeypatch.setattr(text, "load", lambda path, device: made)
    return made


def test_help_is_quick_it_loads_no_transformers():
    code = (
        "import sys, nsa.cli\n"
        "sys.argv = ['nsa', '--help']\n"
        "try: nsa.cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit('transformers' in sys.modules or 'matplotlib' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("generate", "chat", "train", "eval", "convert", "inspect", "bench", "env"):
        assert command in done.stdout


def test_version_is_the_packages(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"nsa {nsa.__version__}\n"


def test_generate_prints_prompt_and_answer_and_passes_every_option(monkeypatch, capsys, model):
    options = ["--max-new-tokens", "7", "--temperature", "0", "--top-p", "0.5", "--seed", "3"]
    assert run(monkeypatch, "generate", "--model", "m", "--prompt", "Once ", *options) == 0
    shown = capsys.readouterr()
    assert shown.out == "Once two words\n"
    assert "3 + 2 tokens in 0.5 s" in shown.err
    asked = {"max_new_tokens": 7, "temperature": 0.0, "top_p": 0.5, "seed": 3}
    assert model.asked == [("Once ", asked)]


def test_generate_reads_a_prompt_file(monkeypatch, capsys, model, tmp_path):
    (tmp_path / "p.txt").write_text("From a file ", encoding="utf-8")
    assert (
        run(monkeypatch, "generate", "--model", "m", "--prompt-file", str(tmp_path / "p.txt")) == 0
    )
    assert capsys.readouterr().out == "From a file two words\n"


def test_a_prompt_that_is_not_utf8_is_refused_before_it_is_shown(monkeypatch, capsys, model):
    assert run(monkeypatch, "generate", "--model", "m", "--prompt", "a\udcff") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "prompt: expected UTF-8 text" in shown.err


def test_chat_answers_until_an_empty_line(monkeypatch, capsys, model):
    lines = iter(["Hello", "Again", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run(monkeypatch, "chat", "--model", "m") == 0
    assert [prompt for prompt, _ in model.asked] == ["Hello\n", "Hello\ntwo words\nAgain\n"]
    assert capsys.readouterr().out == "two words\ntwo words\n"


def test_chat_goes_on_after_a_message_that_does_not_fit(monkeypatch, capsys, model):
    lines = iter(["Hello", "x" * 100, "Again", "And " * 6, ""])
    stream = model.stream

    def refuse_long(prompt, **options):
        if not model.room(prompt, None):
            raise ValueError("prompt: too long. Shorten it.")
        return stream(prompt, **options)

    monkeypatch.setattr(model, "stream", refuse_long)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run(monkeypatch, "chat", "--model", "m") == 0
    # Of 40 characters the last message leaves 16 alone and 4 after what was said before it.
    last = "And And And And And And\n"
    assert [prompt for prompt, _ in model.asked] == ["Hello\n", "Hello\ntwo words\nAgain\n", last]
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("Error: prompt: too long. Shorten it.") == 1
    assert "it has forgotten the oldest part (2 of your messages so far)" in shown


def test_chat_ends_with_the_input(monkeypatch, model):
    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert run(monkeypatch, "chat", "--model", "m") == 0
    assert model.asked == []


BAD = [
    pytest.param(
        ["generate", "--model", "m"],
        "--prompt, --prompt-file: expected exactly one",
        id="no-prompt",
    ),
    pytest.param(
        ["generate", "--model", "/nowhere/m", "--prompt", "x"], "/nowhere/m", id="no-model"
    ),
    pytest.param(
        ["generate", "--model", "m", "--prompt-file", "/nowhere/p.txt"],
        "/nowhere/p.txt",
        id="no-file",
    ),
    pytest.param(
        ["env", "--device", "tpux"],
        "--device: expected cpu, cuda, cuda:1 ..., got 'tpux'",
        id="device",
    ),
    pytest.param(
        ["env", "--device", "cuda:99"], "--device: got 'cuda:99', but PyTorch sees", id="no-device"
    ),
    pytest.param(
        ["env", "--device", "meta"],
        "--device: got 'meta', which PyTorch cannot use here",
        id="no-values-on-the-device",
    ),
    pytest.param(
        ["generate", "--model", "m", "--prompt-file", "tests"],
        "tests: Is a directory.",
        id="folder-for-a-file",
    ),
    pytest.param(["bench", "ops", "--shape", "big"], "shape: expected one of tiny", id="shape"),
    pytest.param(["bench", "plot", "--results", "/nowhere/r.jsonl"], "/nowhere/r.jsonl", id="plot"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_model_of_another_config_is_one_line(monkeypatch, capsys, tmp_path):
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    capsys.readouterr()  # the bar of saving
    logged = io.StringIO()
    handler = StreamHandler(logged)
    logging.add_handler(handler)
    try:
        assert run(monkeypatch, "generate", "--model", str(tmp_path), "--prompt", "x") == 2
    finally:
        logging.remove_handler(handler)
    shown = capsys.readouterr().err.splitlines()
    (line,) = [line for line in shown if line and not line.startswith("Loading weights:")]
    assert "expected the weights that config.json describes" in line
    assert logged.getvalue() == ""


def test_an_error_does_not_stand_behind_the_prompt(monkeypatch, capfd, model):
    def refuse(*_, **__):
        raise ValueError("prompt: too long.")

    monkeypatch.setattr(model, "stream", refuse)
    assert run(monkeypatch, "generate", "--model", "m", "--prompt", "Once") == 2
    assert capfd.readouterr() == ("Once\n", "Error: prompt: too long.\n")


def test_brackets_in_a_message_are_printed_as_they_are(monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("q: expected [batch, seq, heads, dim], got [red].")

    monkeypatch.setattr(text, "load", fail)
    assert run(monkeypatch, "generate", "--model", "m", "--prompt", "x") == 2
    assert capsys.readouterr().err == "Error: q: expected [batch, seq, heads, dim], got [red].\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(ImportError('pip install "native-sparse-attention[plot]"'), 2, id="extra"),
        pytest.param(OSError(28, "No space left on device"), 2, id="disk-full"),
        pytest.param(NotImplementedError("no kernel yet"), 2, id="unsupported"),
    ],
)
def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(text, "load", fail)
    assert run(monkeypatch, "generate", "--model", "m", "--prompt", "x") == code
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ImportError("cannot import name 'text'"), KeyError("q"), AssertionError("ours")]
)
def test_bugs_of_ours_keep_their_traceback(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(text, "load", fail)
    monkeypatch.setattr(sys, "argv", ["nsa", "generate", "--model", "m", "--prompt", "x"])
    with pytest.raises(type(error)):
        cli.main()


def test_ctrl_c_says_so_and_exits_with_130(monkeypatch, capsys, model):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "stream", interrupt)
    assert run(monkeypatch, "generate", "--model", "m", "--prompt", "x") == 130
    assert "Interrupted." in capsys.readouterr().err


def test_ctrl_c_outside_a_command_says_so_too(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupt)
    assert run(monkeypatch) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_gpu_is_picked_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.pick_device(None) == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.pick_device(None) == torch.device("cpu")


def test_env_prints_what_runs_where(monkeypatch, capsys):
    assert run(monkeypatch, "env", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert "window_attention" in shown


def test_bench_ops_measures_appends_and_plots(monkeypatch, capsys, tmp_path):
    results, picture = tmp_path / "ops.jsonl", tmp_path / "ops.png"
    only = ["--operation", "window_attention", "--workload", "local", "--mode", "forward"]
    to_results = ["--output", str(results)]
    assert run(monkeypatch, "bench", "ops", "--quick", "--device", "cpu", *only, *to_results) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["reference", "sdpa"]
    assert rows[0]["command"].startswith("nsa bench ops --quick")
    assert "window_attention" in capsys.readouterr().out
    plotting = ["--results", str(results), "--output", str(picture)]
    assert run(monkeypatch, "bench", "plot", *plotting) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run(monkeypatch, "bench", "plot", "--dtype", "float64", *plotting) == 2
    assert "got no rows" in capsys.readouterr().err


def test_bench_ops_fails_when_a_provider_is_wrong(monkeypatch, tmp_path):
    from nsa.bench import run as bench_run

    def wrong(*_):
        raise bench_run.WrongResultError("off by one")

    monkeypatch.setattr(bench_run, "check", wrong)
    only = ["--operation", "window_attention", "--output", str(tmp_path / "ops.jsonl")]
    assert run(monkeypatch, "bench", "ops", "--quick", "--device", "cpu", *only) == 1
    assert not (tmp_path / "ops.jsonl").exists()


def test_convert_writes_a_model_and_shows_what_it_did(monkeypatch, capsys, tmp_path):
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    small_model(attention="dense").save_pretrained(dense)
    character_tokenizer().save_pretrained(dense)
    (tmp_path / "text.txt").write_text("A short text.", encoding="utf-8")
    arguments = ["--model", str(dense), "--output", str(sparse)]
    options = ["--shared-kv", "--compressor", "gated", "--set", "window_size=77"]
    text_file = ["--text", str(tmp_path / "text.txt")]
    assert run(monkeypatch, "convert", *arguments, *options, *text_file) == 0
    shown = capsys.readouterr().out
    assert "On a text of 13 tokens" in shown
    assert "KL(dense, converted)" in shown
    config = json.loads((sparse / "config.json").read_text())
    assert (config["attention"], config["window_size"]) == ("nsa", 77)
    assert (config["compressor"], config["kv_per_branch"]) == ("gated", False)
    assert run(monkeypatch, "convert", *arguments) == 2
    assert "output: expected a new folder" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m nsa.cli --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
