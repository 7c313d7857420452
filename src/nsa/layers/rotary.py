"""Rotary position embedding: cosines and sines of positions, and the rotation itself."""

from __future__ import annotations

import torch
from torch import Tensor


def default_frequencies(dim: int, base: float = 10_000.0) -> Tensor:
    """Unscaled inverse frequencies, float32 ``[dim / 2]``: ``base ** (-2i / dim)``."""
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def rotation(
    positions: Tensor, inv_freq: Tensor, *, attention_scaling: float = 1.0, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines that ``rotate`` takes.

    Args:
        positions: integer ``[...]``, counted from the start of each sequence.
        inv_freq: float32 ``[dim / 2]``; scaled ones (YaRN, llama3, ...) reach further.
        attention_scaling: factor on both, by which YaRN sharpens the logits.
        dtype: of the result. The angles themselves are float32 whatever it is.

    Returns:
        ``cos`` and ``sin [..., dim]``.
    """
    half = positions[..., None].float() * inv_freq.to(positions.device, torch.float32)
    angles = torch.cat((half, half), dim=-1)
    return (angles.cos() * attention_scaling).to(dtype), (angles.sin() * attention_scaling).to(
        dtype
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first ``rotary_dim`` channels of ``x``, the halves paired as in Llama.

    Args:
        x: queries or keys ``[..., seq, heads, dim]``.
        cos: ``[..., seq, rotary_dim]``, broadcast over heads and, with a leading 1, over the batch.
        sin: like cos.

    Returns:
        Like x, in x's dtype also under autocast, so that all branches keep one dtype.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return turned if kept.shape[-1] == 0 else torch.cat((turned, kept), dim=-1)
