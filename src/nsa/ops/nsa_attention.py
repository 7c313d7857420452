"""Public op: the whole of eq. 5 after projection and compression."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops import checks
from nsa.ops.backend import custom_op, differentiable, implementation, resolve_backend
from nsa.ops.fakes import attention_outputs, gradients_of
from nsa.ops.select_blocks import config_from, geometry_of


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    *,
    config: NSAConfig,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    q_offset: int = 0,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Native Sparse Attention: ``g_cmp o_cmp + g_slc o_slc + g_win o_win`` (eq. 5).

    Gradients reach every tensor but not the choice of blocks.

    Args:
        q: rotated queries ``[batch, seq, heads, Dk]``, or packed ``[tokens, heads, Dk]``.
        k_cmp: compressed, rotated keys as ``compress_kv`` lays them out.
        v_cmp: compressed values.
        k_slc: rotated keys of the selection branch ``[batch, keys, kv_heads, Dk]``.
        v_slc: values of the selection branch ``[batch, keys, kv_heads, Dv]``.
        k_win: rotated keys of the window branch; may be ``k_slc``.
        v_win: values of the window branch; may be ``v_slc``.
        gates: ``[batch, seq, heads, 3]`` in the order cmp, slc, win; any real numbers, usually
            sigmoids.
        config: block sizes and counts.
        softmax_scale: factor of the logits, ``1 / sqrt(Dk)`` if None.
        cu_seqlens: int32 ``[num_seqs + 1]``, exactly when q is packed: where sequences
            start, from 0 to the number of tokens, never decreasing (read and checked on a CPU
            only).
        max_seqlen: tokens of the longest packed sequence, or more; None if that is not known
            without asking the device. Where all fit the selection, kernels need not choose.
        q_offset: position of the first query in its sequence (batches only).
        recompute: keep the lists of blocks and the log-sum-exps for the backward, and compute the
            branch outputs again there. It saves three tensors of o's size and costs most of a
            forward.
        backend: ``"reference"`` or ``"kernel"``; by device if None.

    Returns:
        ``o`` like q with last dim Dv.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.

    Example:
        >>> config = NSAConfig.tiny()
        >>> q, k, v = torch.randn(1, 50, 4, 8), torch.randn(1, 50, 2, 8), torch.randn(1, 50, 2, 8)
        >>> k_cmp, v_cmp = compress_kv(k, v, kind="mean", compress_block_size=16, compress_stride=8)
        >>> nsa_attention(q, k_cmp, v_cmp, k, v, k, v, torch.rand(1, 50, 4, 3), config=config).shape
        torch.Size([1, 50, 4, 8])
    """
    checks.config(config)
    checks.flag("recompute", recompute)
    checks.queries(q, cu_seqlens, q_offset)
    checks.longest(max_seqlen, cu_seqlens)
    checks.gates(gates, q)
    checks.keys_values(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"))
    for k, v, names in ((k_slc, v_slc, ("k_slc", "v_slc")), (k_win, v_win, ("k_win", "v_win"))):
        checks.token_keys(q, k, v, names, q_offset)
    checks.value_dims(v_cmp, v_slc, v_win)
    checks.compressed_keys(
        q,
        k_cmp.shape[-3],
        "k_cmp",
        k_cmp,
        q_offset,
        config.compress_block_size,
        config.compress_stride,
    )
    tensors = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    keep = NOTHING if not needs_grad else (LISTS if recompute else OUTPUTS)
    return _attend(
        *tensors,
        cu_seqlens,
        geometry_of(config),
        checks.scale(softmax_scale, q.shape[-1]),
        max_seqlen,
        q_offset,
        keep,
        resolve_backend(q, backend, v_cmp.shape[-1]),
    )[0]


# What a forward keeps for its backward.
NOTHING, LISTS, OUTPUTS = range(3)


@custom_op("nsa::nsa_attention_fwd")
def nsa_attention_fwd(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor | None,
    geometry: list[int],
    softmax_scale: float,
    max_seqlen: int | None,
    q_offset: int,
    keep: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(o, block_indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win)``.

    What is not kept is empty.
    """
    o, *saved = implementation(backend).nsa_attention_fwd(
        q,
        k_cmp,
        v_cmp,
        k_slc,
        v_slc,
        k_win,
        v_win,
        gates,
        cu_seqlens=cu_seqlens,
        config=config_from(geometry),
        softmax_scale=softmax_scale,
        max_seqlen=max_seqlen,
        q_offset=q_offset,
        save=keep != NOTHING,
    )
    saved = saved or _nothing(q)
    indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win = (
        x if _kept(i, keep) else x.new_empty(0) for i, x in enumerate(saved)
    )
    return o, indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win


def _nothing(q: Tensor) -> list[Tensor]:
    branch = [q.new_empty(0), q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))]
    return [q.new_empty(0, dtype=torch.int32), *branch * 3]


def _kept(i: int, keep: int) -> bool:
    """Of the tensors after ``o``: outputs are the second, fourth and sixth."""
    is_output = i in (1, 3, 5)
    return keep == OUTPUTS or (keep == LISTS and not is_output)


@nsa_attention_fwd.register_fake
def _(
    q,
    k_cmp,
    v_cmp,
    k_slc,
    v_slc,
    k_win,
    v_win,
    gates,
    cu_seqlens,
    geometry,
    softmax_scale,
    max_seqlen,
    q_offset,
    keep,
    backend,
):
    n = config_from(geometry).num_selected_blocks
    indices = q.new_empty((*q.shape[:-2], k_cmp.shape[-2], n), dtype=torch.int32)
    branches = [x for v in (v_cmp, v_slc, v_win) for x in attention_outputs(q, v)]
    saved = [x if _kept(i, keep) else x.new_empty(0) for i, x in enumerate((indices, *branches))]
    return attention_outputs(q, v_cmp)[0], *saved


@custom_op("nsa::nsa_attention_bwd")
def nsa_attention_bwd(
    do: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    saved: list[Tensor],
    cu_seqlens: Tensor | None,
    geometry: list[int],
    softmax_scale: float,
    max_seqlen: int | None,
    q_offset: int,
    keep: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the eight tensors."""
    code, config = implementation(backend), config_from(geometry)
    where = {
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "softmax_scale": softmax_scale,
        "q_offset": q_offset,
    }
    if keep == LISTS:
        indices, _, lse_cmp, _, lse_slc, _, lse_win = saved
        o_cmp, o_slc, o_win = code.branch_outputs(
            q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, indices, config=config, **where
        )
        saved = [indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win]
    return code.nsa_attention_bwd(
        do,
        q,
        k_cmp,
        v_cmp,
        k_slc,
        v_slc,
        k_win,
        v_win,
        gates,
        tuple(saved),
        config=config,
        **where,
    )


@nsa_attention_bwd.register_fake
def _(
    do,
    q,
    k_cmp,
    v_cmp,
    k_slc,
    v_slc,
    k_win,
    v_win,
    gates,
    saved,
    cu_seqlens,
    geometry,
    softmax_scale,
    max_seqlen,
    q_offset,
    keep,
    backend,
):
    return gradients_of(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, cu_seqlens, geometry, softmax_scale, max_seqlen, q_offset, keep, backend = inputs
    ctx.constants = (geometry, softmax_scale, max_seqlen, q_offset, keep, backend)
    ctx.save_for_backward(*tensors, *output[1:], cu_seqlens)


def _backward(ctx, do, *_grads_of_saved):
    if do is None:  # nothing that is differentiated used the output
        return (None,) * (9 + len(ctx.constants))
    # Unpacked once: activation checkpointing refuses a second time.
    *tensors, cu_seqlens = ctx.saved_tensors
    tensors, saved = tensors[:8], tensors[8:]
    grads = nsa_attention_bwd(do, *tensors, saved, cu_seqlens, *ctx.constants)
    return *grads, *[None] * (1 + len(ctx.constants))


_attend = differentiable(nsa_attention_fwd, _setup_context, _backward)
