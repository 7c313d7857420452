"""transformers' Trainer: it learns, resumes bit for bit, and evaluates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.small import random_ids, small_config
from transformers import Trainer, TrainingArguments

from nsa.models import NSAForCausalLM

STEPS = 6
# Its new name where transformers has it; the old one warns there.
_NAMES = TrainingArguments.__dataclass_fields__
CHECKPOINTING = {
    "activation_checkpointing"
    if "activation_checkpointing" in _NAMES
    else "gradient_checkpointing": True
}


def trainer(folder: Path, attention: str, **arguments) -> Trainer:
    torch.manual_seed(0)
    model = NSAForCausalLM(small_config(attention=attention, initializer_range=0.02))
    text = random_ids(6).repeat(6)  # 36 tokens that can be learnt
    data = [{"input_ids": text, "labels": text} for _ in range(2 * STEPS)]
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    return Trainer(model, settings, train_dataset=data, eval_dataset=data[:2])


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, attention):
    whole = trainer(tmp_path, attention)
    whole.train()
    assert len(losses(whole)) == STEPS
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    resumed = trainer(tmp_path, attention)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.evaluate()["eval_loss"] < losses(whole)[0]


def test_prediction_leaves_the_cache_out(tmp_path):
    run = trainer(tmp_path, "nsa")
    found = run.predict(run.eval_dataset)
    assert found.predictions.shape == (2, 36, 97)


def test_gradient_checkpointing(tmp_path):
    plain = trainer(tmp_path / "plain", "nsa")
    plain.train()
    frugal = trainer(tmp_path / "frugal", "nsa", **CHECKPOINTING)
    frugal.train()
    assert losses(frugal) == losses(plain)
