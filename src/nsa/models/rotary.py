"""Rotary embedding of the model: transformers' scaling types over ``nsa.layers.rotation``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nsa.layers import default_frequencies, rotation
from nsa.models.configuration import NSAModelConfig


class RotaryEmbedding(nn.Module):
    """Cosines and sines by ``config.rope_parameters``: default, linear, yarn, llama3, ...

    The frequencies are the config's alone. Were they to follow the length of the text, as with
    "dynamic" and "longrope", which the config refuses, a row would depend on its neighbours in the
    batch, and cached keys would keep the rotation of a shorter text.
    """

    inv_freq: Tensor

    def __init__(self, config: NSAModelConfig):
        super().__init__()
        self.config = config
        inv_freq, self.attention_scaling = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self) -> tuple[Tensor, float]:
        """Float32 ``[rotary_dim / 2]`` on the CPU, and the factor of cosines and sines."""
        rope = self.config.rope_parameters
        assert rope is not None, "filled in by the config"
        with torch.device("cpu"):
            if rope["rope_type"] == "default":
                assert self.config.head_dim is not None, "filled in by the config"
                dim = int(self.config.head_dim * rope.get("partial_rotary_factor", 1.0))
                return default_frequencies(dim, rope["rope_theta"]), 1.0
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, torch.device("cpu"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32 and not self.inv_freq.is_meta:
            # `.bfloat16()` moves weights, and must not round the angles of far positions.
            self.inv_freq = self.frequencies()[0].to(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``cos`` and ``sin [..., rotary_dim]`` of positions."""
        return rotation(
            positions, self.inv_freq, attention_scaling=self.attention_scaling, dtype=dtype
        )
