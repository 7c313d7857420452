"""Inputs of a layer of a trained model, kept in a file, so that operations meet real data.

``nsa bench trace`` writes such a file and ``--workload trace:FILE`` measures with it. Sizes and
geometry are those of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nsa.bench.shapes import Shape
from nsa.config import NSAConfig
from nsa.layers import NativeSparseAttention
from nsa.models.saving import write_errors
from nsa.serve import text as text_models
from nsa.train.files import replacing

# Tensors whose second dimension is the position of a token.
BY_TOKEN = ("q", "k_tokens", "v_tokens", "k_slc", "v_slc", "k_win", "v_win", "gates")


def capture(
    model: Path, text: Path, output: Path, *, device: torch.device, layer: int, max_tokens: int
) -> Shape:
    """Writes what a layer hands to its operations while the model reads a text.

    Args:
        model: folder of a trained model, with "mlp" compressors.
        text: UTF-8 file, read from its start.
        output: ``.safetensors``.
        device: where the model runs.
        layer: number of the layer.
        max_tokens: how much of the text is read.

    Returns:
        The sizes, as ``shape`` reads them back.

    Raises:
        ValueError: no such layer, another compressor, or less text than one compressed block.
        OSError: the disk is full; nothing is left of the file.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"output: expected .safetensors, got {output.name!r}.")
    written = text_models.read_prompt(text)
    loaded = text_models.load(model, device=device)
    attention = _layer(loaded.model, layer)
    limit = min(max_tokens, loaded.model.config.max_position_embeddings)
    ids = loaded.tokenizer(written, verbose=False)["input_ids"][:limit]
    config = attention.config
    if len(ids) < config.compress_block_size:
        raise ValueError(
            f"{text}: expected at least one compressed block = {config.compress_block_size} "
            f"tokens, got {len(ids)}."
        )
    with torch.no_grad(), _inputs_of(attention) as found:
        loaded.model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    metadata = {"config": json.dumps(asdict(config)), "layer": str(layer), "model": model.name}
    output.parent.mkdir(parents=True, exist_ok=True)
    # Copies, since branches may share their keys and a file may not.
    copies = {name: x.cpu().contiguous().clone() for name, x in found.items()}
    with replacing(output) as staged, write_errors():
        save_file(copies, staged, metadata)
    return shape(output)


def _layer(model: nn.Module, layer: int) -> NativeSparseAttention:
    layers = [module for module in model.modules() if isinstance(module, NativeSparseAttention)]
    if not 0 <= layer < len(layers):
        raise ValueError(
            f"layer: expected one of {len(layers)} NSA layers, counted from 0, got {layer}."
        )
    kind = layers[layer].compressor.kind
    if kind != "mlp":
        raise ValueError(f"model: expected mlp compressors, got {kind}.")
    return layers[layer]


@contextmanager
def _inputs_of(attention: NativeSparseAttention) -> Iterator[dict[str, Tensor]]:
    """Receives what the first call of a layer hands to its operations."""
    found: dict[str, Tensor] = {}

    def before_compression(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found["k_tokens"], found["v_tokens"] = args[:2]

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "cos", "sin")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, cos, sin = (given[name] for name in names)
        inputs = attention.branch_inputs(x, cos, sin)
        found.update({name: y for name, y in inputs._asdict().items() if name in BY_TOKEN})
        middle, stride = attention.config.compress_block_size // 2, attention.config.compress_stride
        found["cos_cmp"], found["sin_cmp"] = (y[:, middle::stride] for y in (cos, sin))
        for side in ("k", "v"):
            weights = attention.compressor.weights(side, inputs.q.dtype)
            found.update({f"{name}_{side}": y for name, y in weights._asdict().items()})

    with ExitStack() as stack:
        for handle in (
            attention.register_forward_pre_hook(before, with_kwargs=True),
            attention.compressor.register_forward_pre_hook(before_compression),
        ):
            stack.callback(handle.remove)
        yield found


def shape(path: str | Path) -> Shape:
    """Sizes and geometry of a trace; its name is the file's, its length the only one measured.

    Raises:
        ValueError: the file is not a trace.
        OSError: it cannot be read.
    """
    found, config = _read(str(path))
    batch, seq_len, num_heads, key_dim = found["q"].shape
    assert batch == 1, "a trace holds one text"
    return Shape(
        name=Path(path).stem,
        num_heads=num_heads,
        num_kv_heads=found["k_slc"].shape[2],
        key_dim=key_dim,
        value_dim=found["v_slc"].shape[3],
        seq_lens=(seq_len,),
        config=config,
    )


def tensors(
    path: str | Path, seq_len: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The first ``seq_len`` tokens of a trace.

    Raises:
        ValueError: the trace is shorter, or the file is not a trace.
    """
    found, _ = _read(str(path))
    available = found["q"].shape[1]
    if seq_len > available:
        raise ValueError(
            f"{path}: expected {seq_len} tokens, got {available}. Measurements are checked at a "
            "length where blocks must be chosen, so a trace needs more than "
            "num_selected_blocks * block_size tokens."
        )
    cut = {name: x[:, :seq_len] if name in BY_TOKEN else x for name, x in found.items()}
    return {name: x.to(device, dtype) for name, x in cut.items()}


@lru_cache(maxsize=1)
def _read(path: str) -> tuple[dict[str, Tensor], NSAConfig]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a trace of `nsa bench trace`, got {error}.") from error
    if "config" not in metadata or not set(BY_TOKEN) <= set(found):
        raise ValueError(f"{path}: expected a trace of `nsa bench trace`, got other tensors.")
    return found, NSAConfig(**json.loads(metadata["config"]))
