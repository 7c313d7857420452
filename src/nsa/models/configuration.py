"""Hugging Face configuration: Llama's fields, NSA's geometry, the dense twin's switch."""

from __future__ import annotations

import difflib
import math
from contextlib import suppress
from dataclasses import fields
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from nsa.config import NSAConfig
from nsa.ops.compress_kv import KINDS

_GEOMETRY = tuple(NSAConfig.__dataclass_fields__)
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "v_head_dim",
    "max_position_embeddings",
)
_BOOLS = (
    "kv_per_branch",
    "qk_norm",
    "attention_bias",
    "mlp_bias",
    "use_cache",
    "tie_word_embeddings",
)
# The rotary types, and what each cannot do without. transformers has two more, "dynamic" and
# "longrope", whose frequencies follow the length of the text: see nsa.models.rotary.
_ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "proportional": (),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# Older names of the rotary values, which transformers translates.
_TRANSLATED = frozenset({"partial_rotary_factor", "rope_scaling", "rope_theta"})
# What transformers itself writes into config.json or passes on: it says how a model is loaded or
# shown, and nothing of the model.
OF_TRANSFORMERS = frozenset(
    {
        *(field.name for field in fields(PreTrainedConfig)),
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "torch_dtype",
    }
)


class NSAModelConfig(PreTrainedConfig):
    """Sizes of a Llama-like decoder with Native Sparse Attention, or with dense attention.

    Args:
        vocab_size: entries of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU.
        num_hidden_layers: blocks.
        num_attention_heads: query heads.
        num_key_value_heads: kv heads; as many as query heads if None.
        head_dim: channels of queries and keys; ``hidden_size / num_attention_heads`` if None.
        v_head_dim: channels of values; as ``head_dim`` if None.
        max_position_embeddings: tokens of the longest sequence.
        hidden_act: activation of the SwiGLU, by its name in transformers.
        initializer_range: standard deviation of new weights.
        rms_norm_eps: epsilon of the norms.
        rope_parameters: as in transformers: ``rope_type`` ("default", "linear", "proportional",
            "yarn" or "llama3"), ``rope_theta`` and the scaling's own values; ``rope_theta=...``
            alone is accepted too.
        attention: "nsa", or "dense" for the twin with the same sizes and causal SDPA.
        kv_per_branch: each branch has its own keys and values (the paper), or all share one pair.
        compressor: kind of phi, "mlp", "linear", "gated" or "mean".
        qk_norm: an RMSNorm on each head of queries and keys.
        compress_block_size: as in ``NSAConfig``, like the six below.
        compress_stride: see there.
        block_size: see there.
        num_selected_blocks: see there.
        num_init_blocks: see there.
        num_local_blocks: see there.
        window_size: see there.

    Numbers may be written as strings where a float is meant, since YAML 1.1 reads 1e-6 as one.

    Raises:
        ValueError: an unknown key, or a value that does not fit; the message names it.

    Example:
        >>> NSAModelConfig(hidden_size=64, num_attention_heads=4).geometry.window_size
        512
    """

    model_type = "native_sparse_attention"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32_000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    attention: str = "nsa"
    kv_per_branch: bool = True
    compressor: str = "mlp"
    qk_norm: bool = False
    compress_block_size: int = 32
    compress_stride: int = 16
    block_size: int = 64
    num_selected_blocks: int = 16
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_keys(set(kwargs) - OF_TRANSFORMERS - _TRANSLATED)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self._check_positive("hidden_size", "num_attention_heads")
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size: expected a multiple of num_attention_heads = "
                    f"{self.num_attention_heads} when head_dim is not given, got "
                    f"{self.hidden_size}. Pass head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.v_head_dim is None:
            self.v_head_dim = self.head_dim
        rope = kwargs.pop("rope_scaling", None) or self.rope_parameters or {}
        beside = {name: kwargs.pop(name, None) for name in ("rope_theta", "partial_rotary_factor")}
        if isinstance(rope, dict):  # else refused below
            rope = {name: x for name, x in beside.items() if x is not None} | rope
        self.rope_parameters = rope
        if self.pad_token_id == -1:
            self.pad_token_id = None  # as older files of Llama write it
        if self.dtype is None:
            self.dtype = kwargs.pop("torch_dtype", None)
        self._check_values()
        super().__post_init__(**kwargs)

    def _check_keys(self, unknown: set[str]) -> None:
        if not unknown:
            return
        known = sorted({field.name for field in fields(self)} - OF_TRANSFORMERS | _TRANSLATED)
        name = min(unknown)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"NSAModelConfig: unknown key {name!r}.{hint} Known keys: {', '.join(known)}."
        )

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}.")

    def _check_values(self) -> None:
        self._check_positive(*_POSITIVE)
        assert self.num_key_value_heads is not None, "filled in before"
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_key_value_heads: expected a divisor of num_attention_heads = "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}."
            )
        for name, choices in (
            ("attention", ("nsa", "dense")),
            ("compressor", KINDS),
            ("hidden_act", sorted(ACT2FN)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}.")
        for name in _BOOLS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}: expected true or false, got {value!r}.")
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if self.dtype is not None and not known:
            raise ValueError(
                "dtype: expected a floating dtype of PyTorch, such as bfloat16, or none, got "
                f"{self.dtype!r}."
            )
        for name in ("initializer_range", "rms_norm_eps"):
            setattr(self, name, _number(name, getattr(self, name), zero=True))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, list)
            if value is not None and not all(map(_is_int, value if several else [value])):
                kind = "an int, a list of them" if name == "eos_token_id" else "an int"
                raise ValueError(f"{name}: expected {kind} or none, got {value!r}.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id: expected a token of the vocabulary, 0 to {self.vocab_size - 1}, or "
                f"none, got {self.pad_token_id}. Leave it out, or raise vocab_size."
            )
        self._check_rope()
        _ = self.geometry

    def _check_rope(self) -> None:
        """Also fills in what may be left out, as transformers does."""
        rope = self.rope_parameters
        if not isinstance(rope, dict):
            raise ValueError(
                "rope_parameters: expected a mapping with rope_type, rope_theta and the values of "
                f"that type, got {rope!r}."
            )
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in list(_ROPE_TYPES):
            raise ValueError(
                f"rope_type: expected one of {', '.join(_ROPE_TYPES)}, whose frequencies are the "
                f"same for texts of any length, got {rope_type!r}. To reach further, take yarn."
            )
        rope.setdefault("rope_theta", self.default_theta)
        for name, value in rope.items():
            if name not in ("rope_type", "type", "truncate") and value is not None:
                rope[name] = _number(f"rope_parameters.{name}", value)
        if not isinstance(rope.get("truncate", True), bool):
            raise ValueError(
                f"rope_parameters.truncate: expected true or false, got {rope['truncate']!r}."
            )
        self.standardize_rope_params()
        for name in ("rope_theta", *_ROPE_TYPES[rope_type]):
            if rope.get(name) is None:
                raise ValueError(
                    f"rope_parameters.{name}: expected a positive number with rope_type "
                    f"{rope_type!r}, got none."
                )
        if (rope.get("partial_rotary_factor") or 1.0) > 1.0:
            raise ValueError(
                "rope_parameters.partial_rotary_factor: expected at most 1, the whole head, got "
                f"{rope['partial_rotary_factor']}."
            )
        assert self.head_dim is not None, "filled in before"
        # Of a part of the head, transformers takes one channel more where it is odd.
        if (
            self.head_dim % 2
            and int(self.head_dim * (rope.get("partial_rotary_factor") or 1.0)) == self.head_dim
        ):
            raise ValueError(
                "head_dim: expected an even number, since the rotary embedding turns pairs of "
                f"channels, got {self.head_dim}. Pass another head_dim."
            )

    @property
    def geometry(self) -> NSAConfig:
        """Block sizes and counts, checked."""
        return NSAConfig(**{name: getattr(self, name) for name in _GEOMETRY})

    @property
    def layer_types(self) -> list[str]:
        """The kind of cache of each layer. Not written to config.json.

        transformers checks names in files against a closed list, also where it does not know this
        class.
        """
        kind = "full_attention" if self.attention == "dense" else "nsa_attention"
        return [kind] * self.num_hidden_layers

    def validate(self) -> None:
        """Checks every value again, at a model's start and before transformers writes config.json.

        Its own checks would refuse the layer type, which is in none of its files.
        """
        self._check_values()
        self.validate_rope()
        self.validate_token_ids()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(name: str, value: Any, *, zero: bool = False) -> float:
    """The value, read if it is a string; positive, or ``zero``."""
    number: Any = value
    if isinstance(value, str):
        with suppress(ValueError):
            number = float(value)
    known = isinstance(number, int | float) and not isinstance(number, bool)
    if not known or not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        kind = "a number of at least 0" if zero else "a positive number"
        raise ValueError(f"{name}: expected {kind}, got {value!r}.")
    return number
