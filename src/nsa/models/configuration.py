"""Hugging Face configuration: Llama's fields, NSA's geometry, the dense twin's switch."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

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
# What transformers itself writes into config.json or passes on, and older names it translates.
_OF_TRANSFORMERS = frozenset(
    {
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
        "partial_rotary_factor",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
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
        rope_parameters: as in transformers: ``rope_type``, ``rope_theta`` and the scaling's own
            values; ``rope_theta=...`` alone is accepted too.
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
        self._check_keys(set(kwargs) - _OF_TRANSFORMERS)
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
        self._check_values()
        super().__post_init__(**kwargs)

    def _check_keys(self, unknown: set[str]) -> None:
        if not unknown:
            return
        known = sorted({field.name for field in fields(self)} | {"rope_theta", "rope_scaling"})
        name = min(unknown)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"NSAModelConfig: unknown key {name!r}.{hint} Known keys: {', '.join(known)}."
        )

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}.")

    def _check_values(self) -> None:
        self._check_positive(*_POSITIVE)
        assert self.num_key_value_heads is not None, "filled in before"
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_key_value_heads: expected a divisor of num_attention_heads = "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}."
            )
        for name, choices in (("attention", ("nsa", "dense")), ("compressor", KINDS)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}.")
        for name in ("kv_per_branch", "qk_norm", "attention_bias", "mlp_bias", "use_cache"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}: expected true or false, got {value!r}.")
        _ = self.geometry

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
        """Checks every value again; transformers calls it before it writes config.json.

        Its own checks would refuse the layer type, which is in none of its files.
        """
        self._check_values()
        self.validate_rope()
        self.validate_token_ids()
