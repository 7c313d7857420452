"""Trainer's part: settings reach it, saves fail safely, several processes give one's losses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.disk import full_disk
from tests.train import tiny
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

from nsa.cli import app
from nsa.models import NSAForCausalLM, NSAModelConfig
from nsa.train.checkpoint import CheckpointError
from nsa.train.config import LoopConfig
from nsa.train.engine import NSATrainer, training_arguments
from nsa.train.progress import Milestones
from nsa.train.run import TrainResult, train

QUIET = Console(quiet=True)


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    """Trains in a new folder with the given settings."""

    def start(**training: Any) -> TrainResult:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return train(tiny.config(corpus, folder, **training), console=QUIET)

    return start


def _logged(result: TrainResult, key: str) -> list[float]:
    history = json.loads((result.output_dir / "history.json").read_text())
    return [entry[key] for entry in history if key in entry]


@pytest.mark.parametrize(
    ("training", "shares"),
    [
        pytest.param(
            {"schedule": "wsd", "decay_steps": 2, "min_lr_ratio": 0.5},
            [0.5, 0.75, 1, 1, 1, 0.75],
            id="wsd",
        ),
        pytest.param({"min_lr_ratio": 0.2}, [0, 0.5, 1, 0.88284, 0.6, 0.31716], id="cosine"),
    ],
)
def test_schedule(
    training: dict[str, Any], shares: list[float], run: Callable[..., TrainResult]
) -> None:
    rates = _logged(run(**training), "learning_rate")
    assert [rate / 1e-2 for rate in rates] == pytest.approx(shares, abs=1e-4)


def test_micro_batches_recomputation_and_workers_do_not_change_the_losses(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputed: list[bool] = []
    packed: list[bool] = []
    forward = NSAForCausalLM.forward

    def spy(self, *args, **kwargs):
        recomputed.append(self.model.gradient_checkpointing and self.training)
        if self.training:
            assert kwargs["cu_seqlens"][-1] == kwargs["input_ids"].shape[1]
            packed.append(len(kwargs["cu_seqlens"]) > 2)
        return forward(self, *args, **kwargs)

    single = run(batch_rows=4, micro_batch_rows=1)
    joined = run(batch_rows=4, micro_batch_rows=4)
    monkeypatch.setattr(NSAForCausalLM, "forward", spy)
    recomputing = run(batch_rows=4, micro_batch_rows=4, gradient_checkpointing=True, num_workers=2)
    assert any(recomputed)
    assert any(packed)
    losses = [loss for _, loss in joined.losses]
    assert [loss for _, loss in single.losses] == pytest.approx(losses, rel=1e-4)
    assert [loss for _, loss in recomputing.losses] == pytest.approx(losses, rel=1e-5)


def test_compiled_model_has_the_same_losses_from_one_graph(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = run()

    def without_compiler(loop: LoopConfig) -> TrainingArguments:
        args = training_arguments(loop)
        assert args.torch_compile_mode is None  # CUDA graphs are for a GPU
        # What inductor gets, without the C++ compiler that it needs on CPUs.
        args.torch_compile_backend = "aot_eager"
        return args

    monkeypatch.setattr("nsa.train.run.training_arguments", without_compiler)
    torch.compiler.reset()
    counters.clear()
    compiled = run(compile=True)
    assert counters["stats"]["unique_graphs"] == 1
    losses = [loss for _, loss in eager.losses]
    assert [loss for _, loss in compiled.losses] == pytest.approx(losses, rel=1e-5)
    assert compiled.validation_losses[-1][1] == pytest.approx(eager.validation_losses[-1][1])
    assert AutoModelForCausalLM.from_pretrained(compiled.model_dir)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Of what inductor imports.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # Inductor's first.
def test_cuda_graphs_have_the_losses_of_the_eager_model(run: Callable[..., TrainResult]) -> None:
    """With accumulation, whose gradients outlive a replay, and a short row at the end of epochs."""
    torch.compiler.reset()
    settings = {"precision": "fp32", "batch_rows": 4, "max_steps": 30}
    eager, compiled = run(**settings), run(**settings, compile=True)
    losses = [loss for _, loss in eager.losses]
    assert [loss for _, loss in compiled.losses] == pytest.approx(losses, rel=1e-3)
    assert losses[-1] < losses[0] - 0.5


def test_bf16_is_close_to_fp32_with_fp32_weights(run: Callable[..., TrainResult]) -> None:
    exact = [loss for _, loss in run(precision="fp32").losses]
    result = run(precision="bf16")
    rounded = [loss for _, loss in result.losses]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert result.validation_losses[-1][1] == pytest.approx(exact[-1], rel=0.1)
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert model.dtype == torch.float32


def test_optimizer_settings_arrive(corpus: Path, tmp_path: Path) -> None:
    config = tiny.config(
        corpus, tmp_path, weight_decay=0.3, beta1=0.7, beta2=0.8, max_grad_norm=0.5, batch_rows=6
    )
    args = training_arguments(config.training)
    assert args.gradient_accumulation_steps == 6
    assert args.max_grad_norm == 0.5
    model = NSAForCausalLM(NSAModelConfig(vocab_size=270, **config.model))
    trainer = NSATrainer(run_dir=tmp_path, model=model, args=args, keep_checkpoints=1)
    decayed, plain = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == (0.7, 0.8)
    norms = {p for name, p in model.named_parameters() if "norm" in name or name.endswith("bias")}
    assert set(plain["params"]) == norms


def _spoil_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights become NaN when the loop has done ``step``, before it logs, evaluates or saves."""
    on_step_end = Milestones.on_step_end

    def spoil(self, args, state, control, model=None, **kwargs) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            with torch.no_grad():
                model.lm_head.weight.fill_(float("nan"))

    monkeypatch.setattr(Milestones, "on_step_end", spoil)


@pytest.mark.parametrize(
    ("step", "trouble", "kept"),
    [
        pytest.param(3, "the loss at step 4 is nan", "checkpoint-2", id="loss"),
        pytest.param(4, "weights at step 4 are NaN", "checkpoint-2", id="weights"),
        pytest.param(6, "the validation loss at step 6 is nan", "checkpoint-4", id="validation"),
    ],
)
def test_diverged_run_ends_and_the_checkpoint_before_it_stays(
    step: int,
    trouble: str,
    kept: str,
    run: Callable[..., TrainResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _spoil_after(step, monkeypatch)
    every = {"eval_every": 0, "keep_checkpoints": 1}
    with pytest.raises(
        ValueError, match=rf"diverged: {trouble}.* training\.initial_model=.*{kept}"
    ):
        run(**every)
    run_dir = tmp_path / "0"
    assert [p.name for p in run_dir.glob("checkpoint-*")] == [kept]
    assert not (run_dir / "model").exists()
    assert not list(run_dir.glob(".partial/*"))
    monkeypatch.undo()
    # What the message says to do.
    again = run(initial_model=str(run_dir / kept), learning_rate=1e-3)
    assert again.model_dir is not None


@pytest.mark.parametrize("validates", [True, False])
def test_huge_weights_are_not_saved(validates: bool, corpus: Path, tmp_path: Path) -> None:
    values = tiny.settings(corpus, tmp_path / "run", learning_rate=1e30, max_steps=2)
    if not validates:
        del values["data"]["validation"], values["training"]["eval_every"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code != 0
    assert str(result.exception).startswith("training diverged: ")
    assert "training.warmup_steps, and start again." in str(result.exception)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "model").exists()


def test_final_model_has_finite_weights(corpus: Path, tmp_path: Path) -> None:
    config = tiny.config(corpus, tmp_path)
    model = NSAForCausalLM(NSAModelConfig(vocab_size=270, **config.model))
    args = training_arguments(config.training)
    trainer = NSATrainer(run_dir=tmp_path, model=model, args=args, keep_checkpoints=1)
    assert trainer.save_final_model().is_dir()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("inf")
    with pytest.raises(ValueError, match="training diverged: weights at step 0"):
        trainer.save_final_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert saved.lm_head.weight.isfinite().all()


def test_checkpoint_of_a_diverged_run_is_not_resumed(
    finished: TrainResult, corpus: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished.output_dir, tmp_path / "copy"))
    for name, remedy in (("checkpoint-6", "go on from .*checkpoint-4"), ("checkpoint-4", "Start")):
        file = run_dir / name / "model.safetensors"
        weights = load_file(file)
        weights["lm_head.weight"][0, 0] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{name}: expected finite weights.*{remedy}"):
            train(tiny.config(corpus, run_dir), resume=True, console=QUIET)
        shutil.rmtree(run_dir / name)


@pytest.mark.parametrize(
    ("save", "error", "message"),
    [
        pytest.param(1, OSError, r"File too large.*tokenizer'$", id="first"),
        pytest.param(3, CheckpointError, r"step 4 .*too large.*checkpoint-2 is intact", id="step"),
        pytest.param(5, CheckpointError, r"step 6 .*too large.*checkpoint-6 is intact", id="model"),
    ],
)
def test_tokenizer_that_cannot_be_saved(
    save: int,
    error: type[Exception],
    message: str,
    finished: TrainResult,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saves: list[str] = []
    save_pretrained = PreTrainedTokenizerFast.save_pretrained

    def limited(self, folder) -> None:
        saves.append(folder)
        with full_disk() if len(saves) == save else nullcontext():
            save_pretrained(self, folder)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", limited)
    config = tiny.config(corpus, tmp_path / "run")
    with pytest.raises(error, match=message):
        train(config, console=QUIET)
    assert not list(tmp_path.glob("run/.partial/*"))
    assert train(config, resume=True, console=QUIET).losses == finished.losses


def test_failed_save_keeps_the_previous_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint = Trainer._save_checkpoint

    def limited(self, model, trial) -> None:
        with full_disk(20_000) if self.state.global_step == 4 else nullcontext():
            save_checkpoint(self, model, trial)

    config = tiny.config(corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", limited)
        with pytest.raises(CheckpointError, match=r"step 4 .*checkpoint-2 is intact"):
            train(config, console=QUIET)
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = train(config, resume=True, console=QUIET)
    straight = train(tiny.config(corpus, tmp_path / "other"), console=QUIET)
    assert resumed.losses == straight.losses


DISTRIBUTED = """
import dataclasses, shutil, sys
from pathlib import Path
import torch.distributed as dist
from nsa.train.config import load_config
from nsa.train.run import train

def start(name, **changes):
    training = dataclasses.replace(config.training, output_dir=str(folder / name), **changes)
    return train(dataclasses.replace(config, training=training), resume=name == "resumed")

config, folder = load_config(sys.argv[1]), Path(sys.argv[2])
start("ddp")
start("fsdp", fsdp=True)
if dist.get_rank() == 0:
    shutil.copytree(folder / "fsdp", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoint-6")
    shutil.rmtree(folder / "resumed" / "model")
dist.barrier()
start("resumed", fsdp=True)
for fsdp in (False, True):
    try:
        start("diverged", learning_rate=1e30, fsdp=fsdp)
    except ValueError as error:
        print(error)
dist.destroy_process_group()
"""


def _torchrun(script: Path, *args: Path) -> subprocess.CompletedProcess[str]:
    """Two processes on a free port; none of them outlives a time-out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", str(script), *map(str, args)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        # torchrun puts its workers in sessions of their own, and ends them when asked to.
        process.terminate()
        out, err = process.communicate(timeout=40)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(
    run: Callable[..., TrainResult], corpus: Path, tmp_path: Path
) -> None:
    script, path, folder = (tmp_path / n for n in ("distributed.py", "config.yaml", "runs"))
    script.write_text(DISTRIBUTED)
    path.write_text(yaml.safe_dump(tiny.settings(corpus, folder, batch_rows=4)))
    launched = _torchrun(script, path, folder)
    assert launched.returncode == 0, launched.stderr[-4000:]
    one = run(batch_rows=4)
    weights = AutoModelForCausalLM.from_pretrained(one.model_dir).state_dict()
    for name in ("ddp", "fsdp", "resumed"):
        history = json.loads((folder / name / "history.json").read_text())
        for key, wanted in (("loss", one.losses), ("eval_loss", one.validation_losses)):
            got = [(entry["step"], entry[key]) for entry in history if key in entry]
            assert [step for step, _ in got] == [step for step, _ in wanted]
            assert [x for _, x in got] == pytest.approx([x for _, x in wanted], rel=1e-5)
        # accelerate runs DDP on CPUs when asked for FSDP; sharded runs leave these files.
        sharded = (folder / name / "checkpoint-6" / "pytorch_model_fsdp.bin").is_file()
        assert sharded == (name != "ddp")
        saved = AutoModelForCausalLM.from_pretrained(folder / name / "model").state_dict()
        for key, value in weights.items():
            torch.testing.assert_close(saved[key], value, rtol=1e-3, atol=1e-5)
    assert launched.stdout.count("Done. Model") == 3
    # Both processes stopped, once with DDP and once with FSDP2.
    assert launched.stdout.count("training diverged: weights at step 2") == 4
    assert not list((folder / "diverged").glob("checkpoint-*"))
