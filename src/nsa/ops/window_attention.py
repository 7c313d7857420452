"""Public op: sliding-window attention (the ``win`` branch of eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.ops import checks
from nsa.ops.backend import custom_op, differentiable, implementation, resolve_backend
from nsa.ops.fakes import attention_outputs, gradients_of


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    q_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Attends to the last ``window_size`` tokens, the query's own included: ``t - w < s <= t``.

    Args:
        q: rotated queries ``[batch, seq, heads, Dk]``, or packed ``[tokens, heads, Dk]``.
        k: rotated keys ``[batch, keys, kv_heads, Dk]``, one per token.
        v: values ``[batch, keys, kv_heads, Dv]``.
        window_size: keys each query sees; the same number in training, prefill and decoding.
        softmax_scale: factor of the logits, ``1 / sqrt(Dk)`` if None.
        cu_seqlens: int32 ``[num_seqs + 1]``, exactly when q is packed: where sequences
            start, from 0 to the number of tokens, never decreasing (read and checked on a CPU
            only).
        q_offset: position of the first query in its sequence (batches only); keys always start at
            position 0.
        backend: ``"reference"`` or ``"kernel"``; by device if None.

    Returns:
        ``o`` like q with last dim Dv.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.

    Example:
        >>> q, k, v = torch.randn(1, 9, 4, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
        >>> window_attention(q, k, v, window_size=4).shape
        torch.Size([1, 9, 4, 16])
    """
    checks.queries(q, cu_seqlens, q_offset)
    checks.token_keys(q, k, v, ("k", "v"), q_offset)
    checks.positive("window_size", window_size)
    o, _ = _attend(
        q,
        k,
        v,
        cu_seqlens,
        window_size,
        checks.scale(softmax_scale, q.shape[-1]),
        q_offset,
        resolve_backend(q, backend, v.shape[-1]),
    )
    return o


@custom_op("nsa::window_attention_fwd")
def window_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    window_size: int,
    softmax_scale: float,
    q_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``(o, lse)``."""
    return implementation(backend).window_attention_fwd(
        q,
        k,
        v,
        cu_seqlens=cu_seqlens,
        window_size=window_size,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
    )


@window_attention_fwd.register_fake
def _(q, k, v, cu_seqlens, window_size, softmax_scale, q_offset, backend):
    return attention_outputs(q, v)


@custom_op("nsa::window_attention_bwd")
def window_attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    window_size: int,
    softmax_scale: float,
    q_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``."""
    return implementation(backend).window_attention_bwd(
        do,
        dlse,
        q,
        k,
        v,
        o,
        lse,
        cu_seqlens=cu_seqlens,
        window_size=window_size,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
    )


@window_attention_bwd.register_fake
def _(do, dlse, q, k, v, o, lse, cu_seqlens, window_size, softmax_scale, q_offset, backend):
    return gradients_of(q, k, v)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    q, k, v, cu_seqlens, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, do, dlse):
    *tensors, cu_seqlens = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(tensors[-2])
    grads = window_attention_bwd(do, dlse, *tensors, cu_seqlens, *ctx.constants)
    return *grads, *[None] * (1 + len(ctx.constants))


_attend = differentiable(window_attention_fwd, _setup_context, _backward)
