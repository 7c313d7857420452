"""Loading a checkpoint for use, with the checks that tell a damaged one from a good one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model, ours or any other of transformers, and its tokenizer.

    Args:
        path: a folder that ``save_pretrained`` wrote, of the model and of the tokenizer.
        dtype: of the weights; as saved if None.

    Returns:
        The model, in eval mode on the CPU, and the tokenizer.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: a file is cut short, the weights belong to another config, a weight is not
            finite, or the tokenizer knows more tokens than the model.
    """
    folder = Path(path)
    model = load_weights(folder, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    embeddings: Any = model.get_input_embeddings()
    vocab_size = embeddings.num_embeddings
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{folder}: expected a tokenizer of at most {vocab_size} tokens, as the model embeds, "
            f"got {len(tokenizer)}. Tokenizer and model do not belong together."
        )
    return model, tokenizer


def load_weights(path: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """As ``load_model``, for a folder that need not have a tokenizer; returns the model alone."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model: expected a folder with config.json and weights, found none at {folder}. Train "
            "one with `nsa train`, or correct the path."
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model: expected {folder / 'config.json'}, which is not there.")
    check_json(folder)
    for file in _weight_files(folder):
        _check_complete(file)
    model = _load_weights(folder, dtype)
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ValueError(
                f"{folder}: expected finite weights, but {name} has NaN or infinity. The training "
                "that saved it diverged; take an earlier checkpoint."
            )
    return model.eval()


def check_json(folder: Path) -> None:
    """Checks that every JSON file in ``folder`` is whole.

    Of one cut short, transformers and tokenizers say nothing or do not say which it is.

    Raises:
        ValueError: one is not.
    """
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file}: expected JSON, got {error}. It is cut short or damaged: copy the "
                "checkpoint again."
            ) from None


def _weight_files(folder: Path) -> list[Path]:
    """One file, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model: expected weights in {folder / name}, not there.")
    return [folder / name for name in names]


def _check_complete(file: Path) -> None:
    """The header of a safetensors file says how long the file is; opening it compares."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected a whole safetensors file, but it is cut short or damaged ({error}). "
            "Copy it again, or take an earlier checkpoint."
        ) from None


def _load_weights(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the table of weights that do not fit: they are an error below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded
    wrong: list[tuple[str, Any]] = [
        ("missing", info["missing_keys"]),
        ("of another shape", [key[0] for key in info["mismatched_keys"]]),
        ("unknown", info["unexpected_keys"]),
    ]
    found = [f"{len(names)} {kind} ({min(names)}, ...)" for kind, names in wrong if names]
    if found:
        raise ValueError(
            f"{folder}: expected the weights that config.json describes, got {'; '.join(found)}. "
            "Weights and config.json do not belong together."
        )
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(
            f"model: expected a tokenizer beside the weights, found no tokenizer.json in {folder}. "
            "Save it there with tokenizer.save_pretrained."
        )
    return read_tokenizer(folder)


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of that name on the Hugging Face Hub.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    check_json(Path(path))
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=Path(path).is_dir())
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(
            "tokenizer: expected a folder with tokenizer.json or a name on the Hub, got "
            f"{str(path)!r}, which cannot be read ({str(error).strip().splitlines()[0]}). Copy its "
            "files again, or correct the path."
        ) from error
