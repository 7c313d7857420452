"""Runs a model over a text and measures where every layer looked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from nsa.config import NSAConfig
from nsa.inspect.measure import LayerTrace, measure_layer
from nsa.layers import DenseAttention, NativeSparseAttention
from nsa.layers.rotary import rotate

# The models that `nsa convert` reads, so that a converted one is compared with its source.
_DENSE = (DenseAttention, LlamaAttention, Qwen2Attention, Qwen3Attention)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Where a model looked while it read one text of T tokens.

    Args:
        input_ids: int64 ``[T]``.
        geometry: block sizes and counts of the model.
        layers: the measured layers, by number.
    """

    input_ids: np.ndarray
    geometry: NSAConfig
    layers: dict[int, LayerTrace]

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return len(self.input_ids)

    @property
    def choosing(self) -> np.ndarray:
        """Queries with more blocks before them than they may read, bool ``[T]``.

        The others read everything, so averages of overlap and recall leave them out.
        """
        candidates = np.arange(self.num_tokens) // self.geometry.block_size + 1
        return candidates > self.geometry.num_selected_blocks

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Average of ``values [T, ...]`` over the queries that choose, or over all if none does.

        NaN entries are left out.
        """
        rows = self.choosing if self.choosing.any() else np.ones(self.num_tokens, dtype=bool)
        if rows.sum() == 1 and np.isnan(values[rows]).all():
            return np.zeros(values.shape[1:], dtype=values.dtype)
        return np.nanmean(values[rows], axis=0)


def trace(
    model: nn.Module,
    input_ids: Tensor | Sequence[int],
    *,
    twin: nn.Module | None = None,
    layers: Sequence[int] | None = None,
) -> Trace:
    """Measures selections, gates, compressed attention, overlap and recall for one text.

    Args:
        model: an ``NSAForCausalLM``, or any module whose forward takes ``input_ids [1, T]`` and
            whose layers use ``NativeSparseAttention``.
        input_ids: token ids ``[T]`` or ``[1, T]``.
        twin: a dense model with as many layers and heads: ``attention="dense"``, or the Llama,
            Qwen2 or Qwen3 of transformers that ``model`` was converted from; the trace then says
            which share of its attention the sparse model's tokens hold.
        layers: which layers to measure, all if None.

    Returns:
        Plain NumPy arrays, see ``LayerTrace``.

    Raises:
        ValueError: no such layers, an empty or batched text, or a twin of another shape.

    Example:
        >>> looked = trace(model, tokenizer("Call me Ishmael.")["input_ids"])
        >>> looked.layers[0].gates.shape[-1]
        3
    """
    ids = torch.as_tensor(input_ids)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(
            "input_ids: expected the tokens of one text, [T] or [1, T] with T > 0, got "
            f"{list(torch.as_tensor(input_ids).shape)}. Trace one text at a time."
        )
    attentions = _attentions(model, (NativeSparseAttention,), "model", "attention='nsa'")
    wanted = range(len(attentions)) if layers is None else layers
    for layer in wanted:
        if not 0 <= layer < len(attentions):
            raise ValueError(
                f"layers: expected numbers from 0 to {len(attentions) - 1}, got {layer}."
            )
    dense = None if twin is None else _dense_layers(twin, ids, attentions, wanted)
    found: dict[int, LayerTrace] = {}

    def measure(layer: int, attention: NativeSparseAttention, x: Tensor, cos: Tensor, sin: Tensor):
        inputs = attention.branch_inputs(x, cos, sin)
        found[layer] = measure_layer(
            inputs.q,
            inputs.k_cmp,
            inputs.k_slc,
            inputs.gates,
            config=attention.config,
            softmax_scale=inputs.q.shape[-1] ** -0.5,
            twin=None if dense is None else dense[layer],
        )

    _run(model, ids, {layer: attentions[layer] for layer in wanted}, measure)
    return Trace(
        input_ids=ids[0].cpu().numpy(),
        geometry=attentions[0].config,
        layers={layer: found[layer] for layer in wanted},
    )


def _attentions(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], name: str, setting: str
) -> list[Any]:
    found = [module for module in model.modules() if isinstance(module, kinds)]
    if not found:
        raise ValueError(
            f"{name}: expected a model with {setting}, got {type(model).__name__} without any such "
            "layer. Convert or train one."
        )
    return found


def _dense_layers(
    twin: nn.Module, ids: Tensor, sparse: Sequence[NativeSparseAttention], wanted: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor, float]]:
    """Rotated queries and keys of the twin's layers, and the softmax scale."""
    setting = "attention='dense', or a Llama, Qwen2 or Qwen3 of transformers"
    attentions = _attentions(twin, _DENSE, "twin", setting)
    shapes = [(len(found), *_heads(found[0])) for found in (sparse, attentions)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"twin: expected (layers, heads, kv heads) = {shapes[0]} like the model, got "
            f"{shapes[1]}. Pass the dense twin of this model."
        )
    for layer, attention in enumerate(attentions):
        if getattr(attention, "sliding_window", None) is not None:
            raise ValueError(
                f"twin: expected full attention in every layer, got a sliding window of "
                f"{attention.sliding_window} in layer {layer}."
            )
    found: dict[int, tuple[Tensor, Tensor, float]] = {}

    def keep(layer: int, attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        q, k = _queries_and_keys(attention, x, cos, sin)
        found[layer] = q, k, q.shape[-1] ** -0.5

    _run(twin, ids, {layer: attentions[layer] for layer in wanted}, keep)
    return found


def _heads(attention: Any) -> tuple[int, int]:
    if isinstance(attention, NativeSparseAttention | DenseAttention):
        return attention.num_heads, attention.num_kv_heads
    return attention.config.num_attention_heads, attention.config.num_key_value_heads


def _queries_and_keys(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(attention, DenseAttention):
        return attention.queries_and_keys(x, cos, sin)
    projections = (attention.q_proj, attention.k_proj)
    q, k = (project(x).unflatten(-1, (-1, attention.head_dim)) for project in projections)
    if isinstance(attention, Qwen3Attention):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _run(
    model: nn.Module,
    ids: Tensor,
    attentions: Mapping[int, nn.Module],
    visit: Callable[[int, Any, Tensor, Tensor, Tensor], None],
) -> None:
    """One forward pass that calls ``visit`` with what each attention is about to be given."""

    def hook_of(layer: int):
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = ("hidden_states", "cos", "sin")
            # transformers has cosines and sines in one argument.
            given = dict(zip(names[1:], kwargs.get("position_embeddings", ()), strict=False))
            given |= {**dict(zip(names, args, strict=False)), **kwargs}
            visit(layer, module, *(given[name] for name in names))

        return hook

    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.no_grad())
        for layer, attention in attentions.items():
            handle = attention.register_forward_pre_hook(hook_of(layer), with_kwargs=True)
            stack.callback(handle.remove)
        model(input_ids=ids.to(device), use_cache=False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
