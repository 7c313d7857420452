"""Public op: the choice of blocks each query reads (eq. 8-12). It has no gradient."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops import checks
from nsa.ops.backend import custom_op, implementation, resolve_backend


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    config: NSAConfig,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    q_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Chooses the blocks each query and kv head reads, from the compressed probabilities.

    The probabilities of all query heads of a kv head are summed (eq. 10) over the compressed blocks
    that overlap a selection block (eq. 9). The first ``num_init_blocks`` and the
    ``num_local_blocks`` most recent ones are always chosen; exact ties go to the lower block.

    Args:
        q: rotated queries ``[batch, seq, heads, Dk]``, or packed ``[tokens, heads, Dk]``.
        k_cmp: compressed, rotated keys as ``compress_kv`` lays them out.
        lse: ``[batch, seq, heads]`` from ``compressed_attention`` with the same ``softmax_scale``.
        config: block sizes and counts.
        softmax_scale: factor of the logits, ``1 / sqrt(Dk)`` if None.
        cu_seqlens: int32 ``[num_seqs + 1]``, exactly when q is packed: where sequences
            start, from 0 to the number of tokens, never decreasing (read and checked on a CPU
            only).
        max_seqlen: tokens of the longest packed sequence, or more; None if that is not known
            without asking the device. Where all fit the selection, kernels need not choose.
        q_offset: position of the first query in its sequence (batches only).
        backend: ``"reference"`` or ``"kernel"``; by device if None.

    Returns:
        int32 ``block_indices [batch, seq, kv_heads, n]``, ascending, unused slots -1 at the end.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.

    Example:
        >>> q, k = torch.randn(1, 64, 4, 16), torch.randn(1, 3, 2, 16)
        >>> _, lse = compressed_attention(q, k, k, compress_block_size=32, compress_stride=16)
        >>> select_blocks(q, k, lse, config=NSAConfig()).shape
        torch.Size([1, 64, 2, 16])
    """
    checks.config(config)
    checks.queries(q, cu_seqlens, q_offset)
    checks.longest(max_seqlen, cu_seqlens)
    checks.keys_values(q, k_cmp, k_cmp, ("k_cmp", "k_cmp"))
    checks.compressed_keys(
        q,
        k_cmp.shape[-3],
        "k_cmp",
        k_cmp,
        q_offset,
        config.compress_block_size,
        config.compress_stride,
    )
    checks.log_sum_exp(lse, q)
    return select_blocks_fwd(
        q.detach(),
        k_cmp.detach(),
        lse.detach(),
        cu_seqlens,
        geometry_of(config),
        checks.scale(softmax_scale, q.shape[-1]),
        max_seqlen,
        q_offset,
        resolve_backend(q, backend),
    )


@custom_op("nsa::select_blocks_fwd")
def select_blocks_fwd(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    geometry: list[int],
    softmax_scale: float,
    max_seqlen: int | None,
    q_offset: int,
    backend: str,
) -> Tensor:
    """``block_indices``; ``geometry`` is the config's fields in order."""
    return implementation(backend).select_blocks(
        q,
        k_cmp,
        lse,
        config=config_from(geometry),
        softmax_scale=softmax_scale,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        q_offset=q_offset,
    )


@select_blocks_fwd.register_fake
def _(q, k_cmp, lse, cu_seqlens, geometry, softmax_scale, max_seqlen, q_offset, backend):
    n = config_from(geometry).num_selected_blocks
    return q.new_empty((*q.shape[:-2], k_cmp.shape[-2], n), dtype=torch.int32)


def geometry_of(config: NSAConfig) -> list[int]:
    """``config`` as op schemas carry it, which know lists of ints, not dataclasses."""
    # Not astuple, which copies every number deeply.
    return [getattr(config, name) for name in NSAConfig.__dataclass_fields__]


def config_from(geometry: list[int]) -> NSAConfig:
    """Undoes ``geometry_of``."""
    return _config(*geometry)


@cache
def _config(*geometry: int) -> NSAConfig:
    return NSAConfig(**dict(zip(NSAConfig.__dataclass_fields__, geometry, strict=True)))
