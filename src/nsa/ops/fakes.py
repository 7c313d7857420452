"""Shapes of what the attention ops return, for tracing without data."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Fake ``(o, lse)`` of a branch."""
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(
        q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32)
    )


def gradients_of(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Fake gradients: contiguous tensors of the same shape and dtype."""
    return tuple(x.new_empty(x.shape) for x in tensors)
