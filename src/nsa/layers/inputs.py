"""The check of what every attention module is given; it reads shapes and dtypes only."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.ops import checks
from nsa.ops.checks import describe


def check_inputs(
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    hidden_size: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    """Hidden states fit the weights, cosines and sines fit the hidden states.

    Args:
        hidden_states: ``[batch, seq, hidden_size]``.
        cos: ``[batch or 1, seq, rotary_dim]`` or ``[seq, rotary_dim]``; any floating dtype.
        sin: like cos.
        hidden_size: width of the residual stream.
        head_dim: the most channels that can be rotated.
        dtype: of the weights; hidden states have another one under autocast and with weights that
            are quantised.

    Raises:
        ValueError: one of them does not fit; the message names it.
    """
    for name, x in (("hidden_states", hidden_states), ("cos", cos), ("sin", sin)):
        checks.tensor(name, x)
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {describe(x)}.")
    x = hidden_states
    if x.dim() != 3 or x.shape[0] == 0 or x.shape[2] != hidden_size:
        raise ValueError(
            f"hidden_states: expected [batch, seq, hidden_size = {hidden_size}] with at least one "
            f"sequence, got {describe(x)}."
        )
    # Autocast is asked about last: torch refuses the question for the meta device.
    differs = x.dtype != dtype and dtype in checks.FLOATS
    if differs and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"hidden_states: expected {dtype} like the weights, got {x.dtype}. Cast them with "
            f".to({dtype}), or compute under torch.autocast."
        )
    batch, seq = x.shape[0], x.shape[1]
    rows_fit = cos.dim() == 2 or (cos.dim() == 3 and cos.shape[0] in (1, batch))
    if not rows_fit or cos.shape[-2] != seq:
        raise ValueError(
            f"cos: expected [{batch} or 1, {seq}, rotary_dim], a row per token of hidden_states, "
            f"got {describe(cos)}. Make it with nsa.layers.rotation."
        )
    if cos.shape[-1] % 2 or cos.shape[-1] > head_dim:
        raise ValueError(
            f"cos: expected an even rotary_dim up to head_dim = {head_dim}, got {describe(cos)}. "
            "Make it with nsa.layers.rotation."
        )
    if sin.shape != cos.shape:
        raise ValueError(f"sin: expected {list(cos.shape)} like cos, got {describe(sin)}.")
