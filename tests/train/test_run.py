"""Whole runs: what they leave behind, that they repeat, and that they survive being stopped."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.trainer
import yaml
from rich.console import Console
from tests.disk import cut_to_half
from tests.train import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from nsa import ops
from nsa.cli import app
from nsa.models import NSAForCausalLM
from nsa.train import checkpoint
from nsa.train import run as module
from nsa.train.config import TrainConfig, load_config
from nsa.train.corpus import Corpus
from nsa.train.documents import read_documents
from nsa.train.progress import Milestones
from nsa.train.run import TrainResult, train

GOLDEN = Path(__file__).parents[1] / "golden" / "train_tiny_cpu.json"
QUIET = Console(quiet=True)


@pytest.fixture
def copy(finished: TrainResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.output_dir, tmp_path / "copy"))


def _after_step(step: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs ``action`` when the loop has done ``step``, before it logs or saves."""
    on_step_end = Milestones.on_step_end

    def hook(self, args, state, control, **kwargs) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            action()

    monkeypatch.setattr(Milestones, "on_step_end", hook)


def test_run_leaves_model_tokenizer_config_and_losses(finished: TrainResult) -> None:
    run_dir = finished.output_dir
    assert finished.step == 6
    assert [step for step, _ in finished.losses] == [1, 2, 3, 4, 5, 6]
    assert finished.losses[-1][1] < finished.losses[0][1] - 0.5
    assert [step for step, _ in finished.validation_losses] == [3, 6]
    assert finished.validation is not None
    assert finished.validation.loss == finished.validation_losses[-1][1]
    assert finished.validation.num_documents == 5
    assert finished.signal_number is None
    assert sorted(p.name for p in run_dir.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not list(run_dir.glob(".*"))
    assert list(run_dir.glob("tensorboard/events.*"))
    saved = load_config(run_dir / "config.yaml")
    assert saved.model["vocab_size"] == 270
    assert saved.data.validation_max_tokens == 128
    history = json.loads((run_dir / "history.json").read_text())
    assert any("eval_loss_at/1-63" in entry for entry in history)


def test_validation_reads_all_of_long_documents(finished: TrainResult, corpus: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished.model_dir)
    model = AutoModelForCausalLM.from_pretrained(finished.model_dir)
    losses: list[float] = []
    late: list[float] = []
    for document in read_documents([corpus / "valid.jsonl"]):
        ids = [*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids), 128):
            piece = torch.tensor([ids[start : start + 128]])
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            found = torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="none")
            losses += found.tolist()
            late += found[63:].tolist()  # of positions from 64 on, counted from the piece's start
    assert finished.validation is not None
    assert finished.validation.num_tokens == len(losses) > 5 * 127
    assert finished.validation.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert finished.validation.bin_edges == (1, 64, 128)
    assert finished.validation.bin_losses[1] == pytest.approx(np.mean(late), rel=1e-5)


def test_final_model_is_the_last_checkpoint_and_generates(finished: TrainResult) -> None:
    assert finished.model_dir == finished.output_dir / "model"
    model = AutoModelForCausalLM.from_pretrained(finished.model_dir)
    last = AutoModelForCausalLM.from_pretrained(finished.output_dir / "checkpoint-6")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), last.parameters(), strict=True)
    )
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(finished.model_dir)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer("the cat sees", return_tensors="pt")
    assert prompt["input_ids"][0].tolist().count(model.config.bos_token_id) == 1
    assert prompt["input_ids"][0, 0] == model.config.bos_token_id
    out = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape[1] == prompt["input_ids"].shape[1] + 5


def test_same_seed_gives_the_same_losses_bit_for_bit(
    finished: TrainResult, corpus: Path, tmp_path: Path
) -> None:
    again = train(tiny.config(corpus, tmp_path / "a"), console=QUIET)
    assert again.losses == finished.losses
    assert again.validation_losses == finished.validation_losses
    other = train(tiny.config(corpus, tmp_path / "b", seed=1, max_steps=2), console=QUIET)
    assert other.losses[0] != finished.losses[0]


def _golden_losses(folder: Path) -> list[float]:
    tiny.write_corpus(folder)
    config = tiny.config(folder, folder / "run", max_steps=20, save_every=20, eval_every=0)
    return [loss for _, loss in train(config, console=QUIET).losses]


def test_golden_losses(tmp_path: Path) -> None:
    """Twenty steps against recorded losses.

    Not to the last bit: matrix products round differently from one CPU to another. To record
    anew, with a line in the changelog: python -m tests.train.test_run
    """
    golden = json.loads(GOLDEN.read_text())
    assert _golden_losses(tmp_path) == pytest.approx(golden["losses"], rel=2e-5)


@pytest.mark.parametrize("num", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signal_saves_and_resume_draws_the_same_curve(
    num: signal.Signals,
    finished: TrainResult,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny.config(corpus, tmp_path / "run")
    out = io.StringIO()
    with monkeypatch.context() as patch:
        _after_step(3, lambda: signal.raise_signal(num), patch)
        stopped = train(config, console=Console(file=out, width=200))
    assert stopped.signal_number == num
    assert stopped.step == 3
    assert stopped.model_dir is None
    assert f"Saved {tmp_path / 'run' / 'checkpoint-3'}." in out.getvalue()
    resumed = train(config, resume=True, console=QUIET)
    assert resumed.losses == finished.losses
    assert resumed.validation_losses == finished.validation_losses


KILLED = """
import os, signal, sys
from nsa.train import checkpoint
from nsa.train.config import load_config
from nsa.train.run import train

sync, saves = checkpoint.sync_folder, []
def sync_then_die(folder):
    saves.append(sync(folder))
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.sync_folder = sync_then_die
train(load_config(sys.argv[1]))
"""
RESUMED = """
import dataclasses, sys
from nsa.train.config import load_config
from nsa.train.run import train

config = load_config(sys.argv[1])
other = dataclasses.replace(config.training, output_dir=sys.argv[2])
resumed = train(config, resume=True)
straight = train(dataclasses.replace(config, training=other))
assert resumed.losses == straight.losses, (resumed.losses, straight.losses)
assert resumed.validation_losses == straight.validation_losses
assert [step for step, _ in resumed.losses] == list(range(1, 7))
"""


def _python(script: str, *args: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_save(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny.settings(corpus, run_dir)))
    killed = _python(KILLED, path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # Everything of step 4 was written, but it was not yet a checkpoint.
    assert [p.name for p in run_dir.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (run_dir / ".partial" / "checkpoint-4" / "optimizer.pt").is_file()
    resumed = _python(RESUMED, path, tmp_path / "straight")
    assert resumed.returncode == 0, resumed.stderr
    assert not (run_dir / ".partial").exists()


def test_damaged_checkpoint_is_passed_over_and_said(
    finished: TrainResult, corpus: Path, copy: Path
) -> None:
    weights = copy / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    out = io.StringIO()
    console = Console(file=out, width=300)
    resumed = train(tiny.config(corpus, copy), resume=True, console=console)
    assert "checkpoint-6 is passed over: model.safetensors has 100 bytes instead" in out.getvalue()
    assert resumed.losses == finished.losses


CHECKPOINT_FILES = (
    "config.json",
    "files.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
)


def test_every_file_of_a_checkpoint_is_missed(finished: TrainResult, copy: Path) -> None:
    files = [path.name for path in (copy / "checkpoint-6").iterdir()]
    assert sorted(files) == sorted(CHECKPOINT_FILES)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_file_of_a_checkpoint_cut_to_half_its_size(name: str, corpus: Path, copy: Path) -> None:
    cut_to_half(copy / "checkpoint-6" / name)
    found, (line,) = checkpoint.latest_checkpoint(copy)
    assert found == copy / "checkpoint-4"
    assert f"checkpoint-6 is passed over: {name} " in line
    # Without a whole one the run does not begin again, over what it has.
    cut_to_half(copy / "checkpoint-4" / name)
    before = _contents(copy)
    with pytest.raises(ValueError, match=rf"a whole checkpoint .*4 is passed over: {name} "):
        train(tiny.config(corpus, copy), resume=True, console=QUIET)
    assert _contents(copy) == before


@pytest.mark.parametrize("harm", [cut_to_half, Path.unlink], ids=["cut", "missing"])
@pytest.mark.parametrize("name", ["config.yaml", "data.json"])
def test_file_of_a_run_that_is_not_whole(
    name: str, harm: Callable[[Path], None], corpus: Path, copy: Path
) -> None:
    harm(copy / name)
    before = _contents(copy)
    with pytest.raises(ValueError, match=rf"{name}: expected the file of the run.*Copy it again"):
        train(tiny.config(corpus, copy), resume=True, console=QUIET)
    assert _contents(copy) == before


def test_run_is_resumed_without_its_tokenizer_folder(
    finished: TrainResult, corpus: Path, copy: Path
) -> None:
    shutil.rmtree(copy / "tokenizer")
    shutil.rmtree(copy / "checkpoint-6")
    again = train(tiny.config(corpus, copy), resume=True, console=QUIET)
    assert again.losses == finished.losses


def test_finished_run_can_be_resumed_and_extended(
    finished: TrainResult, corpus: Path, copy: Path
) -> None:
    shutil.rmtree(copy / "model")
    same = train(tiny.config(corpus, copy), resume=True, console=QUIET)
    assert same.losses == finished.losses
    assert same.model_dir is not None
    assert (same.model_dir / "model.safetensors").is_file()
    longer = train(tiny.config(corpus, copy, max_steps=8, log_every=2), resume=True, console=QUIET)
    assert [step for step, _ in longer.losses] == [1, 2, 3, 4, 5, 6, 8]


def test_recomputed_branches_draw_the_same_curve(
    finished: TrainResult, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputed: list[bool] = []
    attend = ops.nsa_attention

    def spy(*args, **kwargs) -> torch.Tensor:
        if torch.is_grad_enabled():
            recomputed.append(kwargs["recompute"])
        return attend(*args, **kwargs)

    monkeypatch.setattr(ops, "nsa_attention", spy)
    config = tiny.config(corpus, tmp_path / "run", recompute_branches=True)
    with monkeypatch.context() as patch:
        _after_step(4, lambda: signal.raise_signal(signal.SIGINT), patch)
        train(config, console=QUIET)
    assert recomputed == [True] * 8  # one layer, two rows a step
    recomputed.clear()
    resumed = train(tiny.config(corpus, tmp_path / "run"), resume=True, console=QUIET)
    assert recomputed == [False] * 4
    assert resumed.losses == finished.losses
    assert resumed.validation_losses == finished.validation_losses


def test_tied_embeddings_are_resumed_without_a_warning(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", warnings.append)
    settings = tiny.settings(corpus, tmp_path / "run", max_steps=2)
    settings["model"]["tie_word_embeddings"] = True
    train(TrainConfig.from_dict(settings), console=QUIET)
    settings["training"]["max_steps"] = 4
    longer = train(TrainConfig.from_dict(settings), resume=True, console=QUIET)
    assert warnings == []
    assert longer.model_dir is not None
    model = NSAForCausalLM.from_pretrained(longer.model_dir)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_resume_without_a_checkpoint_starts(corpus: Path, tmp_path: Path) -> None:
    config = tiny.config(corpus, tmp_path / "run", max_steps=2)
    assert train(config, resume=True, console=QUIET).step == 2


def test_folder_with_a_run_is_not_overwritten(corpus: Path, finished: TrainResult) -> None:
    with pytest.raises(ValueError, match=r"already holds a run\. Go on with --resume"):
        train(tiny.config(corpus, finished.output_dir), console=QUIET)


@pytest.mark.parametrize("resume", [True, False])
def test_model_without_checkpoints_is_not_replaced(resume: bool, corpus: Path, copy: Path) -> None:
    for folder in copy.glob("checkpoint-*"):
        shutil.rmtree(folder)
    before = _contents(copy)
    with pytest.raises(ValueError, match=r"holds a model, .*Choose another folder"):
        train(tiny.config(corpus, copy), resume=resume, console=QUIET)
    assert _contents(copy) == before


def test_too_little_memory_is_an_error_that_says_what_to_do(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self, *args, **kwargs) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(NSAForCausalLM, "forward", full)
    with pytest.raises(ValueError, match=r"CUDA out of memory\. Lower training\.micro_batch_rows"):
        train(tiny.config(corpus, tmp_path), console=QUIET)


def test_resume_refuses_other_settings_and_other_text(
    corpus: Path, copy: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"other settings: training\.learning_rate \(was 0\.01, is 0\.02\)"
    ):
        train(tiny.config(corpus, copy, learning_rate=0.02), resume=True, console=QUIET)
    # The same text from another folder is the same data.
    moved = Path(shutil.copytree(corpus, tmp_path / "moved"))
    assert train(tiny.config(moved, copy), resume=True, console=QUIET).step == 6
    with (moved / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}))
    with pytest.raises(ValueError, match=r"the text of data\.train is not what the run"):
        train(tiny.config(moved, copy), resume=True, console=QUIET)


def test_existing_tokenizer_is_used(finished: TrainResult, corpus: Path, tmp_path: Path) -> None:
    values = tiny.settings(corpus, tmp_path / "run", max_steps=2)
    values["tokenizer"] = {"load": str(finished.output_dir / "tokenizer")}
    values["data"]["train"] = [str(corpus / "valid.jsonl")]
    result = train(TrainConfig.from_dict(values), console=QUIET)
    used = (result.output_dir / "tokenizer" / "tokenizer.json").read_text()
    assert used == (finished.output_dir / "tokenizer" / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        pytest.param("model", {"hiden_size": 3}, r"unknown key 'hiden_size'", id="model-key"),
        pytest.param("model", {"compress_stride": 3}, r"compress_stride = 3", id="geometry"),
        pytest.param(
            "model", {"vocab_size": 100}, r"model\.vocab_size: expected at least .* 270", id="vocab"
        ),
        pytest.param(
            "data", {"seq_len": 200}, r"data\.seq_len: expected at most .* 128", id="seq-len"
        ),
        pytest.param(
            "data", {"validation_max_tokens": 129}, r"max_tokens: expected at most", id="read"
        ),
        pytest.param("model", {"pad_token_id": 270}, r"pad_token_id: .* 0 to 269", id="pad"),
        pytest.param("training", {"fsdp": True}, r"fsdp: expected several processes", id="fsdp"),
        pytest.param(
            "training", {"micro_batch_rows": 4}, r"batch_rows: expected a multiple", id="batch"
        ),
    ],
)
def test_settings_that_do_not_fit(
    section: str, change: dict[str, object], message: str, corpus: Path, tmp_path: Path
) -> None:
    values = tiny.settings(corpus, tmp_path / "run")
    values[section].update(change)
    with pytest.raises(ValueError, match=message):
        train(TrainConfig.from_dict(values), console=QUIET)


@pytest.mark.parametrize("below", ["", "run"])
def test_output_dir_that_is_a_file(below: str, corpus: Path) -> None:
    file = corpus / "train.jsonl"
    with pytest.raises(ValueError, match=rf"training\.output_dir: expected a folder.*{file} is a"):
        train(tiny.config(corpus, file / below), console=QUIET)


def test_run_without_held_out_text_can_get_some(corpus: Path, tmp_path: Path) -> None:
    values = tiny.settings(corpus, tmp_path / "run", max_steps=2, eval_every=0)
    values["tokenizer"]["vocab_size"] = 50_000
    del values["data"]["validation"]
    out = io.StringIO()
    train(TrainConfig.from_dict(values), console=Console(file=out, width=200))
    assert re.search(r"^tokenizer: \d{3} of 50,000 tokens; the text gives no", out.getvalue(), re.M)
    # What is saved is a config that loads, and held-out text changes nothing that was drawn.
    load_config(tmp_path / "run" / "config.yaml")
    values["data"]["validation"] = [str(corpus / "valid.jsonl")]
    values["training"]["max_steps"] = 3
    longer = train(TrainConfig.from_dict(values), resume=True, console=QUIET)
    assert longer.validation is not None


def test_empty_corpus_is_refused(tmp_path: Path) -> None:
    tiny.write_corpus(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "  "}\n')
    with pytest.raises(ValueError, match=r"expected text to train on, got none"):
        train(tiny.config(tmp_path, tmp_path / "run"), console=QUIET)
    tiny.write_corpus(tmp_path)
    (tmp_path / "valid.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"data\.validation: expected at least one document"):
        train(tiny.config(tmp_path, tmp_path / "run"), console=QUIET)


def test_held_out_documents_must_predict_something() -> None:
    corpus = Corpus(np.zeros(2, np.uint32), np.array([0, 1, 2]), "")
    with pytest.raises(ValueError, match=r"data\.validation: expected documents of at least 2"):
        module._check_held_out(corpus)
    mixed = Corpus(np.arange(4, dtype=np.uint32), np.array([0, 1, 4]), "")
    module._check_held_out(mixed)
    assert [d.tolist() for d in module._documents(mixed)] == [[1, 2, 3]]


def test_terminal_sees_text_being_read(corpus: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    train(tiny.config(corpus, tmp_path / "run", max_steps=2), console=console)
    assert "tokenizer: learning from the text" in out.getvalue()
    for name in ("train", "validation"):
        assert re.search(rf"{name}: [\d,]+ tokens read", out.getvalue())


def test_run_without_tensorboard_says_so(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_tensorboard_available", lambda: False)
    out = io.StringIO()
    config = tiny.config(corpus, tmp_path / "run", max_steps=2)
    train(config, console=Console(file=out, width=200))
    assert 'pip install "native-sparse-attention[train]"' in out.getvalue()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_command_trains_and_stops_with_the_exit_code_of_ctrl_c(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # Room for the folder's name.
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny.settings(corpus, tmp_path / "run")))
    with monkeypatch.context() as patch:
        _after_step(1, lambda: signal.raise_signal(signal.SIGINT), patch)
        stopped = CliRunner().invoke(app, ["train", str(path), "--set", "training.max_steps=2"])
    assert stopped.exit_code == 130
    assert "Go on with the same command and --resume." in stopped.output
    recomputing = ("--set", "training.recompute_branches=true")
    resumed = CliRunner().invoke(
        app, ["train", str(path), "--set", "training.max_steps=2", "--resume", *recomputing]
    )
    assert resumed.exit_code == 0, resumed.output
    assert "step 2/2  loss" in resumed.output
    assert "validation loss at positions 1-63 " in resumed.output
    assert f"Done. Model: {tmp_path / 'run' / 'model'}" in resumed.output


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        record = {"torch": torch.__version__, "losses": _golden_losses(Path(name))}
    GOLDEN.write_text(json.dumps(record, indent=1) + "\n")
