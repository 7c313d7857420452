"""From a dense checkpoint to Native Sparse Attention, starting where the dense model stopped.

Not training: what the new parts can add (compression, gates by token) is learnt afterwards.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from nsa.config import NSAConfig
from nsa.models.configuration import NSAModelConfig
from nsa.models.conversion_report import ConversionReport, measure_shift
from nsa.models.loading import load_model, load_weights
from nsa.models.modeling import NSAForCausalLM
from nsa.models.saving import write_errors

# Logit of the selection gate; minus this for the two others. See ``convert_from_dense``.
GATE_LOGIT = 6.0

# The same module names as ours, so weights are found by name.
_SUPPORTED: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    NSAModelConfig.model_type: NSAForCausalLM,
}
_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
)
_TEXT = (
    "The lighthouse keeper wrote down the weather every evening. On the first day of March the "
    "wind came from the west, and by nightfall it had turned to the north. Two ships passed; the "
    "second carried timber, and her captain waved. On the second day there was fog, and no ship "
    "passed. When the fog lifted, the keeper counted 14 gulls and added them to the page."
)


def convert_from_dense(
    source: PreTrainedModel | str | Path,
    *,
    config: NSAConfig | None = None,
    compressor: str = "mlp",
    kv_per_branch: bool = True,
    token_ids: Tensor | None = None,
) -> tuple[NSAForCausalLM, ConversionReport]:
    """Makes a model with Native Sparse Attention from the weights of a dense one.

    All weights are copied: each branch gets the dense keys and values, with their biases; queries,
    output, QK-norms, MLPs, norms, embeddings and rotary parameters stay what they are. Phi starts
    as mean pooling.

    Gates start constant: weights 0, and logits -c, +c, -c for cmp, slc, win with c = 6. Selection
    leads since it reads every block up to ``num_selected_blocks * block_size`` tokens, which is
    dense attention, and beyond that still reads the best blocks of the whole text; the window
    would be exact up to ``window_size`` tokens only and blind beyond. Because
    sigmoid(c) + sigmoid(-c) = 1, selection and window together are dense attention exactly while
    both see everything; what remains is sigmoid(-6) = 0.0025 of the compressed output, and nothing
    at all below ``compress_block_size`` tokens. A larger c would start closer still, but gradients
    of a gate shrink with g (1 - g).

    Args:
        source: a ``LlamaForCausalLM``, ``Qwen2ForCausalLM``, ``Qwen3ForCausalLM``, a dense twin
            (``NSAForCausalLM`` with ``attention="dense"``), or a folder with one. It is not
            changed.
        config: geometry of the branches; the paper's if None.
        compressor: kind of phi, "mlp", "linear", "gated" or "mean".
        kv_per_branch: each branch has its own copy of keys and values (the paper), or all share
            one pair.
        token_ids: int64 ``[seq]``, the text on which the report compares both models; at most 256
            random tokens if None, on which losses mean little.

    Returns:
        The model, in eval mode with the dtype and on the device of ``source``, and the report. The
        weights of phi and of the gates' hidden layer come from torch's global generator.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: an architecture, attention variant or tensor that cannot be represented, or
            unsuitable ``token_ids``; the message names it.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4)
        >>> dense = LlamaForCausalLM(LlamaConfig(vocab_size=99, num_hidden_layers=1, **sizes))
        >>> model, report = convert_from_dense(dense)
        >>> report.exact_tokens
        1024
    """
    geometry = config or NSAConfig.paper()
    dense = load_weights(source) if isinstance(source, (str, Path)) else source
    _check_source(dense)
    weights = dense.state_dict()
    model_config = _model_config(
        dense.config, weights, geometry, compressor=compressor, kv_per_branch=kv_per_branch
    )
    exact_tokens = geometry.num_selected_blocks * geometry.block_size
    if token_ids is None:
        token_ids = _random_ids(model_config, exact_tokens)
    _check_token_ids(token_ids, model_config)
    model: Any = AutoModelForCausalLM.from_config(model_config, dtype=dense.dtype)
    model = model.to(dense.device).eval()
    copied, initialised = _fill(model, weights)
    model.generation_config = copy.deepcopy(dense.generation_config)
    report = ConversionReport(
        architecture=type(dense).__name__,
        copied=copied,
        initialised=initialised,
        exact_tokens=exact_tokens,
        shift=measure_shift(dense, model, token_ids),
    )
    return model, report


def convert_folder(
    source: str | Path,
    output: str | Path,
    *,
    config: NSAConfig | None = None,
    compressor: str = "mlp",
    kv_per_branch: bool = True,
    text: str | None = None,
) -> ConversionReport:
    """Converts a folder with a dense model and its tokenizer into a new folder.

    Args:
        source: as ``nsa.models.load_model`` reads it.
        output: the new folder; it must not exist, and appears only when it is complete.
        config: as in ``convert_from_dense``, like the two below.
        compressor: see there.
        kv_per_branch: see there.
        text: on which both models are compared, cut to the model's positions; a built-in English
            paragraph if None.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: as ``convert_from_dense``.
        ValueError: ``output`` exists, ``text`` has no two tokens; and as ``convert_from_dense``.
        OSError: the new folder cannot be written; nothing is left of it.
    """
    target = Path(output)
    if target.exists():
        raise ValueError(f"output: expected a new folder, but {target} exists. Name another one.")
    dense, tokenizer = load_model(source)
    ids: Any = tokenizer(_TEXT if text is None else text)["input_ids"]
    if len(ids) < 2:
        raise ValueError(
            "text: expected at least 2 tokens, since each is predicted from those before it, got "
            f"{len(ids)}. Compare the models on a longer text."
        )
    limit = getattr(dense.config, "max_position_embeddings", len(ids))
    model, report = convert_from_dense(
        dense,
        config=config,
        compressor=compressor,
        kv_per_branch=kv_per_branch,
        token_ids=torch.tensor(ids[:limit], dtype=torch.int64),
    )
    staged = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with write_errors():
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
        staged.rename(target)
    except OSError as error:
        raise OSError(
            f"output: could not write {target} ({error}); nothing is left there."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return report


def read_geometry(overrides: Sequence[str]) -> NSAConfig:
    """The paper's geometry with ``key=value`` strings over it; later ones win.

    Raises:
        ValueError: no ``=``, an unknown key, no whole number, or values that do not fit together.

    Example:
        >>> read_geometry(["window_size=256"]).window_size
        256
    """
    values: dict[str, int] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in NSAConfig.__dataclass_fields__:
            known = ", ".join(NSAConfig.__dataclass_fields__)
            raise ValueError(f"--set: expected key=value with a key of {known}, got {override!r}.")
        if not value.isdecimal():
            raise ValueError(f"{key}: expected a whole number, got {value!r}.")
        values[key] = int(value)
    return NSAConfig(**values)


def _check_source(dense: PreTrainedModel) -> None:
    config: Any = dense.config
    wanted = _SUPPORTED.get(config.model_type)
    if wanted is None or not isinstance(dense, wanted):
        known = ", ".join(cls.__name__ for cls in _SUPPORTED.values())
        raise ValueError(
            f"source: expected one of {known}, got {type(dense).__name__} (model_type "
            f"{config.model_type!r}). Other architectures differ in more than attention."
        )
    for index, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind != "full_attention":
            raise ValueError(
                f"layer_types: expected full_attention in every layer, got {kind} in layer "
                f"{index}. A layer that is sparse or windowed already has no dense form to keep."
            )
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"attention_dropout: expected 0, since sparse attention has no dropout, got {dropout}. "
            "Set it to 0 in the config to go on without."
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"{name}: expected none, since logits are not capped here, got "
                f"{getattr(config, name)}."
            )
    rope = config.rope_parameters or {}
    partial = rope.get("partial_rotary_factor", 1.0)
    ignored = wanted is not NSAForCausalLM and rope.get("rope_type", "default") == "default"
    if ignored and partial != 1.0:
        raise ValueError(
            f"partial_rotary_factor: expected 1, since {type(dense).__name__} ignores it and this "
            f"model does not, got {partial}. Remove it from rope_parameters."
        )


def _model_config(
    source: Any,
    weights: dict[str, Tensor],
    geometry: NSAConfig,
    *,
    compressor: str,
    kv_per_branch: bool,
) -> NSAModelConfig:
    """Sizes from the config; biases and QK-norms from the weights that are there."""
    return NSAModelConfig(
        **{name: copy.deepcopy(getattr(source, name)) for name in _SAME_FIELDS},
        head_dim=getattr(source, "head_dim", None),
        v_head_dim=getattr(source, "v_head_dim", None),
        attention_bias=any(".self_attn." in name and ".bias" in name for name in weights),
        mlp_bias=any(".mlp." in name and ".bias" in name for name in weights),
        qk_norm=any(".q_norm." in name for name in weights),
        compressor=compressor,
        kv_per_branch=kv_per_branch,
        **{name: getattr(geometry, name) for name in NSAConfig.__dataclass_fields__},
    )


@torch.no_grad()
def _fill(
    model: NSAForCausalLM, weights: dict[str, Tensor]
) -> tuple[dict[str, str], dict[str, str]]:
    """Copies what the dense model has, sets the rest; what was done to each tensor."""
    targets = model.state_dict()
    unknown = sorted(set(weights) - set(targets))
    if unknown:
        raise ValueError(
            f"source: expected only weights that have a place here, got {len(unknown)} others "
            f"({unknown[0]}, ...). Merge adapters, and undo what was added to the model."
        )
    num_branches = 3 if model.config.kv_per_branch else 1
    copied, initialised = {}, {}
    for name, target in targets.items():
        if name in weights:
            copied[name] = _copy(name, target, weights[name], num_branches)
        else:
            initialised[name] = _initialise(name, target)
    return copied, initialised


def _copy(name: str, target: Tensor, weight: Tensor, num_branches: int) -> str:
    times = num_branches if name.split(".")[-2] in ("k_proj", "v_proj") else 1
    if target.shape != (times * weight.shape[0], *weight.shape[1:]):
        expected = [target.shape[0] // times, *target.shape[1:]]
        raise ValueError(
            f"{name}: expected {expected} by the config, got {list(weight.shape)}. Weights and "
            "config do not belong together."
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"{name}: expected floating-point weights, got {weight.dtype}. Dequantise the model."
        )
    target.copy_(weight.repeat(times, *[1] * (weight.dim() - 1)))
    return "the dense weights" if times == 1 else "the dense weights, once per branch"


def _initialise(name: str, target: Tensor) -> str:
    if ".compressor." in name:
        return "weights with which phi is mean pooling"
    if name.endswith("gate_mlp.2.weight"):
        target.zero_()
        return "zeros"
    if name.endswith("gate_mlp.2.bias"):
        logits = torch.tensor([-GATE_LOGIT, GATE_LOGIT, -GATE_LOGIT])
        target.copy_(logits.repeat(len(target) // 3))
        return f"cmp, slc, win: {-GATE_LOGIT:g}, {GATE_LOGIT:+g}, {-GATE_LOGIT:g}"
    if ".gate_mlp." in name:
        return "random, without effect yet"
    if name.endswith("_proj.bias"):
        target.zero_()
        return "zeros, as good as none"
    raise ValueError(f"source: expected a weight for {name}, which is missing.")


def _random_ids(config: NSAModelConfig, exact_tokens: int) -> Tensor:
    length = max(2, min(exact_tokens, 256, config.max_position_embeddings))
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))


def _check_token_ids(token_ids: Tensor, config: NSAModelConfig) -> None:
    limit = config.max_position_embeddings
    if token_ids.dtype != torch.int64 or token_ids.dim() != 1 or not 2 <= len(token_ids) <= limit:
        raise ValueError(
            f"token_ids: expected int64 [seq] of 2 to {limit} tokens, got {token_ids.dtype} "
            f"{list(token_ids.shape)}."
        )
    if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < config.vocab_size:
        raise ValueError(
            f"token_ids: expected ids from 0 to {config.vocab_size - 1}, got "
            f"{int(token_ids.min())} to {int(token_ids.max())}."
        )
