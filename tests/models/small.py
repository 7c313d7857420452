"""A model small enough for tests: all edges (block, stride, window) lie within 40 tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa.models import NSAForCausalLM, NSAModelConfig

VOCAB = 97
# For tests of what differs between devices.
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def small_config(**changes: Any) -> NSAModelConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "v_head_dim": 6,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "compress_block_size": 8,
        "compress_stride": 4,
        "block_size": 16,
        "num_selected_blocks": 3,
        "num_local_blocks": 1,
        "window_size": 10,
    }
    return NSAModelConfig(**{**values, **changes})


def small_model(*, dtype: torch.dtype = torch.float32, **changes: Any) -> NSAForCausalLM:
    """In eval mode; every weight random, so that phi is no longer the mean."""
    torch.manual_seed(0)
    model = NSAForCausalLM(small_config(**changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.to(dtype).eval()


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token 0 is padding; ``(input_ids, attention_mask)``."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    return ids, (ids != 0).long()
