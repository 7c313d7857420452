"""Rotary embedding of the model: transformers' scaling types over ``nsa.layers.rotation``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nsa.layers import default_frequencies, rotation
from nsa.models.configuration import NSAModelConfig

# Their frequencies depend on the length of the sequence.
_BY_LENGTH = ("dynamic", "longrope")


def max_positions(config: NSAModelConfig) -> int:
    """Tokens of the longest sequence; "dynamic" scaling multiplies the config's by its factor."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type") == "dynamic":
        return int(config.max_position_embeddings * rope["factor"])
    return config.max_position_embeddings


class RotaryEmbedding(nn.Module):
    """Cosines and sines by ``config.rope_parameters``: default, linear, dynamic, yarn, llama3, ...

    With the types whose frequencies depend on the length, cached keys keep the rotation they were
    written with, as in transformers.

    Raises:
        ValueError: the ``rope_type`` is unknown.
    """

    inv_freq: Tensor

    def __init__(self, config: NSAModelConfig):
        super().__init__()
        self.config = config
        rope = config.rope_parameters or {}
        self.rope_type: str = rope.get("rope_type", "default")
        if self.rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ValueError(f"rope_type: expected one of {known}, got {self.rope_type!r}.")
        inv_freq, self.attention_scaling = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self, seq_len: int | None = None) -> tuple[Tensor, float]:
        """Float32 ``[rotary_dim / 2]`` on the CPU, and the factor of cosines and sines."""
        rope = self.config.rope_parameters or {}
        with torch.device("cpu"):
            if self.rope_type == "default":
                assert self.config.head_dim is not None, "filled in by the config"
                dim = int(self.config.head_dim * rope.get("partial_rotary_factor", 1.0))
                return default_frequencies(dim, rope["rope_theta"]), 1.0
            init = ROPE_INIT_FUNCTIONS[self.rope_type]
            return init(self.config, torch.device("cpu"), seq_len=seq_len)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32 and not self.inv_freq.is_meta:
            # `.bfloat16()` moves weights, and must not round the angles of far positions.
            self.inv_freq = self.frequencies()[0].to(self.inv_freq.device)
        return self

    def forward(
        self, positions: Tensor, *, seq_len: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """``cos`` and ``sin [..., rotary_dim]`` of positions in sequences of ``seq_len`` tokens."""
        inv_freq, attention_scaling = self.inv_freq, self.attention_scaling
        if self.rope_type in _BY_LENGTH:
            inv_freq, attention_scaling = self.frequencies(seq_len)
        return rotation(positions, inv_freq, attention_scaling=attention_scaling, dtype=dtype)
