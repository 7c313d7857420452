"""What a run starts from: random weights, those of a model, or the files of a run before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PreTrainedTokenizerBase

from nsa.layers import NativeSparseAttention
from nsa.models import NSAForCausalLM, NSAModelConfig
from nsa.models.configuration import OF_TRANSFORMERS
from nsa.models.loading import load_tokenizer, load_weights
from nsa.train.config import DataConfig, LoopConfig, TokenizerConfig, TrainConfig


def with_initial_model(config: TrainConfig, run_dir: Path, *, resuming: bool) -> TrainConfig:
    """Fills section ``model`` from that of ``training.initial_model``, where it says nothing.

    A run that is resumed needs that model no more: its own ``config.yaml`` has the settings.

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: it is none of ours.
    """
    folder = config.training.initial_model
    if folder is None:
        return config
    saved = saved_settings(run_dir)["model"] if resuming else _settings(Path(folder))
    return replace(config, model={**saved, **config.model})


def check_initial_tokenizer(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the tokens ``training.initial_model`` learned have the same ids in the run.

    Args:
        config: of the run.
        tokenizer: of the run; it may have more tokens than the model's.

    Raises:
        ValueError: one has not, or the model's tokenizer cannot be read.
    """
    folder = config.training.initial_model
    if folder is None:
        return
    try:
        learned = load_tokenizer(Path(folder)).get_vocab()
    except FileNotFoundError:  # the model was saved without one
        return
    if not learned.items() <= tokenizer.get_vocab().items():
        raise ValueError(
            f"training.initial_model: expected a run with the tokenizer of the model in {folder}, "
            f"got another: their tokens differ. Set tokenizer.load={folder}."
        )


def saved_settings(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The sections of the ``config.yaml`` of a run.

    Raises:
        ValueError: it is missing or not whole.
    """
    path = run_dir / "config.yaml"
    saved = read_record(path, yaml.safe_load)
    sections = {"data": DataConfig, "tokenizer": TokenizerConfig, "training": LoopConfig}
    # YAML that is cut short is often still YAML, without the end. What else is missing is a setting
    # that a run of an earlier version did not have.
    for section, cls in sections.items():
        last = fields(cls)[-1].name
        if last not in (saved.get(section) or ()):
            raise _not_whole(path, f"{section}.{last} is not in it")
    return saved


def read_record(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A file of a run that says what the run began with.

    Raises:
        ValueError: it is missing or not whole.
    """
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _not_whole(path, "there is none") from None
    except (ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise _not_whole(path, "it is cut short or damaged")
    return found


def _not_whole(path: Path, trouble: str) -> ValueError:
    return ValueError(
        f"{path}: expected the file of the run that is to be resumed, but {trouble}. Copy it "
        "again, or start another run from a checkpoint of this one with training.initial_model."
    )


def new_model(config: TrainConfig, *, resuming: bool) -> NSAForCausalLM:
    """The model of a run, with random weights where a checkpoint replaces them anyway.

    Raises:
        FileNotFoundError: ``training.initial_model`` has no weights.
        ValueError: they are damaged, or section ``model`` asks for other shapes.
    """
    model = NSAForCausalLM(NSAModelConfig(**config.model))
    for module in model.modules():
        if isinstance(module, NativeSparseAttention):
            module.recompute = config.training.recompute_branches
    folder = config.training.initial_model
    if folder is None or resuming:
        return model
    weights = load_weights(folder, dtype=torch.float32).state_dict()
    found = {name: weight.shape for name, weight in weights.items()}
    wanted = {name: weight.shape for name, weight in model.state_dict().items()}
    differing = {name for name, _ in found.items() ^ wanted.items()}
    if differing:
        raise ValueError(
            f"training.initial_model: expected section model to describe the model in {folder}, "
            f"but their weights differ: {len(differing)} of them ({min(differing)}, ...). Leave "
            "the settings out to take those of the model."
        )
    model.load_state_dict(weights)
    return model


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"training.initial_model: expected a folder with a model, found no config.json in "
            f"{folder}. `nsa train` and `nsa convert` write such folders."
        )
    saved = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not isinstance(saved, NSAModelConfig):
        raise ValueError(
            f"training.initial_model: expected a model of this package in {folder}, got one of "
            f"type {saved.model_type!r}. `nsa convert` makes one of it."
        )
    values = saved.to_diff_dict()
    return {name: value for name, value in values.items() if name not in OF_TRANSFORMERS}
