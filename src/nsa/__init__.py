"""Native Sparse Attention (arXiv 2502.11089) for training and inference.

``import nsa`` loads PyTorch, neither transformers nor a GPU. The names that need transformers are
loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nsa.cache import NSACache
from nsa.config import NSAConfig
from nsa.layers import NativeSparseAttention
from nsa.ops import (
    CompressorWeights,
    compress_kv,
    compressed_attention,
    nsa_attention,
    nsa_decode,
    select_blocks,
    selected_attention,
    window_attention,
)

if TYPE_CHECKING:
    from nsa.models import NSAForCausalLM, NSAModelConfig, convert_from_dense

__version__ = "0.1.0"

__all__ = [
    "CompressorWeights",
    "NSACache",
    "NSAConfig",
    "NSAForCausalLM",
    "NSAModelConfig",
    "NativeSparseAttention",
    "compress_kv",
    "compressed_attention",
    "convert_from_dense",
    "nsa_attention",
    "nsa_decode",
    "select_blocks",
    "selected_attention",
    "window_attention",
]

_NEED_TRANSFORMERS = ("NSAForCausalLM", "NSAModelConfig", "convert_from_dense")


def __getattr__(name: str) -> object:
    if name in _NEED_TRANSFORMERS:
        return getattr(importlib.import_module("nsa.models"), name)
    raise AttributeError(f"module 'nsa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
