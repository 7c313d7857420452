"""Public op: the newest tokens of each sequence against cached keys and values. Inference only."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa import reference
from nsa.config import NSAConfig
from nsa.ops import checks
from nsa.ops.backend import custom_op
from nsa.ops.select_blocks import config_from, geometry_of


def nsa_decode(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    *,
    seq_lens: Tensor,
    config: NSAConfig,
    softmax_scale: float | None = None,
) -> Tensor:
    """Rows of ``nsa_attention`` for the last ``seq`` tokens of each sequence.

    The keys of these tokens are already in the caches. For inference: it has no gradient. Plain
    PyTorch on every device. It reads ``seq_lens`` back to the host.

    Args:
        q: rotated queries of the newest tokens ``[batch, seq, heads, Dk]``; row ``b``'s last query
            is at position ``seq_lens[b] - 1``.
        k_cmp: cached compressed keys ``[batch, blocks, kv_heads, Dk]``; entries past a row's length
            are never read.
        v_cmp: cached compressed values.
        k_slc: cached keys of the selection branch ``[batch, keys, kv_heads, Dk]``.
        v_slc: cached values of the selection branch.
        k_win: cached keys of the window branch.
        v_win: cached values of the window branch.
        gates: ``[batch, seq, heads, 3]`` in the order cmp, slc, win.
        seq_lens: integer ``[batch]``, tokens in each sequence, the new ones included.
        config: block sizes and counts.
        softmax_scale: factor of the logits, ``1 / sqrt(Dk)`` if None.

    Returns:
        ``o [batch, seq, heads, Dv]``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
        NotImplementedError: in the backward.
    """
    checks.config(config)
    checks.queries(q, None, 0)
    if q.dim() != 4:
        raise ValueError(f"q: expected [batch, seq, heads, dim], got {checks.describe(q)}.")
    checks.gates(gates, q)
    for k, v, names in (
        (k_cmp, v_cmp, ("k_cmp", "v_cmp")),
        (k_slc, v_slc, ("k_slc", "v_slc")),
        (k_win, v_win, ("k_win", "v_win")),
    ):
        checks.keys_values(q, k, v, names)
    checks.value_dims(v_cmp, v_slc, v_win)
    checks.tensor("seq_lens", seq_lens)
    if seq_lens.dtype not in (torch.int32, torch.int64) or list(seq_lens.shape) != [q.shape[0]]:
        raise ValueError(
            f"seq_lens: expected int32 or int64 [{q.shape[0]}], got {checks.describe(seq_lens)}."
        )
    scale = checks.scale(softmax_scale, q.shape[-1])
    return nsa_decode_fwd(
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, seq_lens, geometry_of(config), scale
    )


@custom_op("nsa::nsa_decode_fwd")
def nsa_decode_fwd(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    seq_lens: Tensor,
    geometry: list[int],
    softmax_scale: float,
) -> Tensor:
    """``o``; the lengths are checked here, where their values are known."""
    lengths = seq_lens.tolist()
    room = min(k_slc.shape[1], k_win.shape[1])
    if min(lengths) < q.shape[1] or max(lengths) > room:
        raise ValueError(
            f"seq_lens: expected lengths from {q.shape[1]} (the new tokens) to {room} (the cached "
            f"keys), got {lengths}."
        )
    config = config_from(geometry)
    if config.num_compressed(max(lengths)) > k_cmp.shape[1]:
        raise ValueError(
            f"k_cmp: expected at least {config.num_compressed(max(lengths))} compressed blocks for "
            f"{max(lengths)} tokens, got {checks.describe(k_cmp)}."
        )
    return reference.nsa_decode(
        q,
        k_cmp,
        v_cmp,
        k_slc,
        v_slc,
        k_win,
        v_win,
        gates,
        seq_lens=seq_lens,
        config=config,
        softmax_scale=softmax_scale,
    )


@nsa_decode_fwd.register_fake
def _(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, seq_lens, geometry, softmax_scale):
    return q.new_empty(*q.shape[:-1], v_slc.shape[-1])


def _backward(ctx, do):
    raise NotImplementedError(
        "nsa_decode: it is for inference and has no gradient. Train with nsa_attention on whole "
        "sequences, without a filled cache; decode under torch.no_grad()."
    )


nsa_decode_fwd.register_autograd(_backward)
