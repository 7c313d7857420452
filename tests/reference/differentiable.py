"""The reference's halves, joined so that a check can take their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def differentiable(forward: Callable, backward: Callable, *, differentiated: int = 3) -> Callable:
    """An operation of ``(*tensors, **options)`` with the gradients that ``backward`` computes.

    Args:
        forward: takes the tensors and the options, returns ``(o, lse)``.
        backward: takes ``do, dlse``, the tensors, ``o, lse`` and the options.
        differentiated: how many of the tensors, from the first on, have gradients.
    """

    class Joined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, options: dict, *tensors: Tensor):
            o, lse = forward(*tensors, **options)
            ctx.save_for_backward(*tensors, o, lse)
            ctx.options = options
            return o, lse

        @staticmethod
        def backward(ctx, do: Tensor, dlse: Tensor):
            *tensors, o, lse = ctx.saved_tensors
            gradients = backward(do, dlse, *tensors, o, lse, **ctx.options)
            return None, *gradients, *[None] * (len(tensors) - differentiated)

    return lambda *tensors, **options: Joined.apply(options, *tensors)
