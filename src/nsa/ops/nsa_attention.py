"""Public op: the whole of eq. 5 after projection and compression."""

from __future__ import annotations

from torch import Tensor

from nsa import reference
from nsa.config import NSAConfig
from nsa.ops import checks
from nsa.ops.compressed_attention import compressed_attention
from nsa.ops.select_blocks import select_blocks
from nsa.ops.selected_attention import selected_attention
from nsa.ops.window_attention import window_attention


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
    q_offset: int = 0,
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
        cu_seqlens: int32 ``[num_seqs + 1]``, exactly when q is packed.
        q_offset: position of the first query in its sequence (batches only).
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
    checks.queries(q, cu_seqlens, q_offset)
    checks.gates(gates, q)
    checks.keys_values(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"))
    for k, v, names in ((k_slc, v_slc, ("k_slc", "v_slc")), (k_win, v_win, ("k_win", "v_win"))):
        checks.token_keys(q, k, v, names, q_offset)
    checks.value_dims(v_cmp, v_slc, v_win)
    common = {
        "softmax_scale": softmax_scale,
        "cu_seqlens": cu_seqlens,
        "q_offset": q_offset,
        "backend": backend,
    }
    o_cmp, lse = compressed_attention(
        q,
        k_cmp,
        v_cmp,
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        **common,
    )
    block_indices = select_blocks(q, k_cmp, lse, config=config, **common)
    o_slc = selected_attention(
        q, k_slc, v_slc, block_indices, block_size=config.block_size, **common
    )
    o_win = window_attention(q, k_win, v_win, window_size=config.window_size, **common)
    return reference.combine(o_cmp, o_slc, o_win, gates)
