"""Public op: attention to compressed blocks (the ``cmp`` branch of eq. 5, visibility of eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.ops import checks
from nsa.ops.backend import custom_op, differentiable, implementation, resolve_backend
from nsa.ops.fakes import attention_outputs, gradients_of


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    compress_block_size: int,
    compress_stride: int,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    q_offset: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends to compressed blocks.

    Block ``i`` is visible to position ``t`` when ``i * stride + block - 1 <= t``.

    Args:
        q: rotated queries ``[batch, seq, heads, Dk]``, or packed ``[tokens, heads, Dk]``.
        k_cmp: compressed, rotated keys ``[batch, T_c, kv_heads, Dk]``, or packed
            ``[tokens // stride, kv_heads, Dk]`` as ``compress_kv`` lays them out. Slots that no
            sequence fills have no weight, but must be finite.
        v_cmp: compressed values, ``[..., Dv]``.
        compress_block_size: tokens per compressed block.
        compress_stride: tokens between compressed blocks.
        softmax_scale: factor of the logits, ``1 / sqrt(Dk)`` if None.
        cu_seqlens: int32 ``[num_seqs + 1]``, exactly when q is packed: where sequences
            start, from 0 to the number of tokens, never decreasing (read and checked on a CPU
            only).
        q_offset: position of the first query in its sequence (batches only).
        backend: ``"reference"`` or ``"kernel"``; by device if None.

    Returns:
        ``o`` like q with last dim Dv, and ``lse [batch, seq, heads]``, natural log, float32
        (float64 for float64). A query that sees no block has ``o = 0``, ``lse = -inf`` and zero
        gradients.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.

    Example:
        >>> q, k, v = torch.randn(1, 64, 4, 16), torch.randn(1, 3, 2, 16), torch.randn(1, 3, 2, 16)
        >>> o, lse = compressed_attention(q, k, v, compress_block_size=32, compress_stride=16)
    """
    checks.queries(q, cu_seqlens, q_offset)
    checks.geometry(compress_block_size, compress_stride)
    checks.keys_values(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"))
    checks.compressed_keys(
        q, k_cmp.shape[-3], "k_cmp", k_cmp, q_offset, compress_block_size, compress_stride
    )
    return _attend(
        q,
        k_cmp,
        v_cmp,
        cu_seqlens,
        compress_block_size,
        compress_stride,
        checks.scale(softmax_scale, q.shape[-1]),
        q_offset,
        resolve_backend(q, backend, v_cmp.shape[-1]),
    )


@custom_op("nsa::compressed_attention_fwd")
def compressed_attention_fwd(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens: Tensor | None,
    compress_block_size: int,
    compress_stride: int,
    softmax_scale: float,
    q_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``(o, lse)``."""
    return implementation(backend).compressed_attention_fwd(
        q,
        k_cmp,
        v_cmp,
        cu_seqlens=cu_seqlens,
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
    )


@compressed_attention_fwd.register_fake
def _(
    q,
    k_cmp,
    v_cmp,
    cu_seqlens,
    compress_block_size,
    compress_stride,
    softmax_scale,
    q_offset,
    backend,
):
    return attention_outputs(q, v_cmp)


@custom_op("nsa::compressed_attention_bwd")
def compressed_attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    compress_block_size: int,
    compress_stride: int,
    softmax_scale: float,
    q_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk_cmp, dv_cmp)``."""
    return implementation(backend).compressed_attention_bwd(
        do,
        dlse,
        q,
        k_cmp,
        v_cmp,
        o,
        lse,
        cu_seqlens=cu_seqlens,
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
    )


@compressed_attention_bwd.register_fake
def _(
    do,
    dlse,
    q,
    k_cmp,
    v_cmp,
    o,
    lse,
    cu_seqlens,
    compress_block_size,
    compress_stride,
    softmax_scale,
    q_offset,
    backend,
):
    return gradients_of(q, k_cmp, v_cmp)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    q, k_cmp, v_cmp, cu_seqlens, *ctx.constants = inputs
    ctx.save_for_backward(q, k_cmp, v_cmp, *output, cu_seqlens)


def _backward(ctx, do, dlse):
    q, k_cmp, v_cmp, o, lse, cu_seqlens = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(o)
    grads = compressed_attention_bwd(do, dlse, q, k_cmp, v_cmp, o, lse, cu_seqlens, *ctx.constants)
    return *grads, *[None] * (1 + len(ctx.constants))


_attend = differentiable(compressed_attention_fwd, _setup_context, _backward)
