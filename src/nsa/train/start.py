"""The weights that a run starts from: random ones, or those of a model that is there already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from nsa.models import NSAForCausalLM, NSAModelConfig
from nsa.models.loading import load_weights
from nsa.train.config import TrainConfig

# What a saved config says of itself and not of the model.
_NOT_SETTINGS = {"transformers_version", "model_type", "architectures", "dtype"}


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
    if resuming:
        saved = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["model"]
    else:
        saved = _settings(Path(folder))
    return replace(config, model={**saved, **config.model})


def new_model(config: TrainConfig, *, resuming: bool) -> NSAForCausalLM:
    """The model of a run, with random weights where a checkpoint replaces them anyway.

    Raises:
        FileNotFoundError: ``training.initial_model`` has no weights.
        ValueError: they are damaged, or section ``model`` asks for other shapes.
    """
    model = NSAForCausalLM(NSAModelConfig(**config.model))
    folder = config.training.initial_model
    if folder is None or resuming:
        return model
    weights = load_weights(folder, dtype=torch.float32).state_dict()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"training.initial_model: expected section model to describe the model in {folder}, "
            f"but their weights differ: {error}. Leave the settings out to take those of the model."
        ) from None
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
    return {name: value for name, value in values.items() if name not in _NOT_SETTINGS}
