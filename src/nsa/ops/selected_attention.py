"""Public op: attention to the selected blocks (the ``slc`` branch of eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.ops import checks
from nsa.ops.backend import custom_op, differentiable, implementation, resolve_backend
from nsa.ops.fakes import attention_outputs, gradients_of


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    q_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Attends to the tokens ``s <= t`` of each query's selected blocks (eq. 11-12).

    Args:
        q: rotated queries ``[batch, seq, heads, Dk]``, or packed ``[tokens, heads, Dk]``.
        k: rotated keys ``[batch, keys, kv_heads, Dk]``, one per token.
        v: values ``[batch, keys, kv_heads, Dv]``.
        block_indices: int32 ``[batch, seq, kv_heads, n]`` from ``select_blocks``, -1 for unused
            slots. Counted within the query's own sequence. The choice has no gradient.
        block_size: tokens per selection block.
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
        >>> blocks = torch.zeros(1, 9, 2, 1, dtype=torch.int32)
        >>> selected_attention(q, k, v, blocks, block_size=16).shape
        torch.Size([1, 9, 4, 16])
    """
    checks.queries(q, cu_seqlens, q_offset)
    checks.token_keys(q, k, v, ("k", "v"), q_offset)
    checks.positive("block_size", block_size)
    checks.indices(block_indices, q, k)
    o, _ = _attend(
        q,
        k,
        v,
        block_indices,
        cu_seqlens,
        block_size,
        checks.scale(softmax_scale, q.shape[-1]),
        q_offset,
        resolve_backend(q, backend, v.shape[-1]),
    )
    return o


@custom_op("nsa::selected_attention_fwd")
def selected_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    softmax_scale: float,
    q_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``(o, lse)``."""
    return implementation(backend).selected_attention_fwd(
        q,
        k,
        v,
        block_indices,
        cu_seqlens=cu_seqlens,
        block_size=block_size,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
    )


@selected_attention_fwd.register_fake
def _(q, k, v, block_indices, cu_seqlens, block_size, softmax_scale, q_offset, backend):
    return attention_outputs(q, v)


@custom_op("nsa::selected_attention_bwd")
def selected_attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    softmax_scale: float,
    q_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``."""
    return implementation(backend).selected_attention_bwd(
        do,
        dlse,
        q,
        k,
        v,
        block_indices,
        o,
        lse,
        cu_seqlens=cu_seqlens,
        block_size=block_size,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
    )


@selected_attention_bwd.register_fake
def _(
    do,
    dlse,
    q,
    k,
    v,
    block_indices,
    o,
    lse,
    cu_seqlens,
    block_size,
    softmax_scale,
    q_offset,
    backend,
):
    return gradients_of(q, k, v)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    q, k, v, block_indices, cu_seqlens, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, block_indices, *output, cu_seqlens)


def _backward(ctx, do, dlse):
    *tensors, cu_seqlens = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(tensors[-2])
    grads = selected_attention_bwd(do, dlse, *tensors, cu_seqlens, *ctx.constants)
    return *grads, *[None] * (2 + len(ctx.constants))


_attend = differentiable(selected_attention_fwd, _setup_context, _backward)
