"""The whole of eq. 5 after projection and compression: three branches and their gated sum.

``max_seqlen`` spares kernels a choice of blocks that would be all of them. Here it changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.reference.compressed_attention import compressed_attention_bwd, compressed_attention_fwd
from nsa.reference.masked_attention import compute_dtype
from nsa.reference.select_blocks import select_blocks
from nsa.reference.selected_attention import selected_attention_bwd, selected_attention_fwd
from nsa.reference.window_attention import window_attention_bwd, window_attention_fwd


def nsa_attention_fwd(
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
    softmax_scale: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    q_offset: int = 0,
    save: bool = True,
) -> tuple[Tensor, ...]:
    """``(o, block_indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win)``.

    Only ``(o,)`` unless ``save`` asks for what the backward needs.
    """
    common = {"softmax_scale": softmax_scale, "cu_seqlens": cu_seqlens, "q_offset": q_offset}
    o_cmp, lse_cmp = compressed_attention_fwd(
        q,
        k_cmp,
        v_cmp,
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        **common,
    )
    block_indices = select_blocks(q, k_cmp, lse_cmp, config=config, **common)
    o_slc, lse_slc = selected_attention_fwd(
        q, k_slc, v_slc, block_indices, block_size=config.block_size, **common
    )
    o_win, lse_win = window_attention_fwd(q, k_win, v_win, window_size=config.window_size, **common)
    o = combine(o_cmp, o_slc, o_win, gates)
    return (o, block_indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win) if save else (o,)


def branch_outputs(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    block_indices: Tensor,
    *,
    config: NSAConfig,
    softmax_scale: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(o_cmp, o_slc, o_win)`` of a choice already made: what a backward computes again."""
    common = {"softmax_scale": softmax_scale, "cu_seqlens": cu_seqlens, "q_offset": q_offset}
    o_cmp, _ = compressed_attention_fwd(
        q,
        k_cmp,
        v_cmp,
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        **common,
    )
    o_slc, _ = selected_attention_fwd(
        q, k_slc, v_slc, block_indices, block_size=config.block_size, **common
    )
    o_win, _ = window_attention_fwd(q, k_win, v_win, window_size=config.window_size, **common)
    return o_cmp, o_slc, o_win


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
    saved: tuple[Tensor, ...],
    *,
    config: NSAConfig,
    softmax_scale: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    q_offset: int = 0,
) -> tuple[Tensor, ...]:
    """Gradients of the eight inputs in their order; ``saved`` is what followed ``o``.

    A gate's gradient is the product of ``do`` with its branch's output; a branch sees ``do`` times
    its gate.
    """
    common = {"softmax_scale": softmax_scale, "cu_seqlens": cu_seqlens, "q_offset": q_offset}
    block_indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win = saved
    wide = compute_dtype(q)
    dgates = torch.stack(
        [(do.to(wide) * o.to(wide)).sum(-1) for o in (o_cmp, o_slc, o_win)], dim=-1
    )
    d_cmp, d_slc, d_win = (do.to(wide) * gate.unsqueeze(-1) for gate in gates.to(wide).unbind(-1))
    dq_cmp, *d_cmp_keys = compressed_attention_bwd(
        d_cmp,
        None,
        q,
        k_cmp,
        v_cmp,
        o_cmp,
        lse_cmp,
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        **common,
    )
    dq_slc, *d_slc_keys = selected_attention_bwd(
        d_slc,
        None,
        q,
        k_slc,
        v_slc,
        block_indices,
        o_slc,
        lse_slc,
        block_size=config.block_size,
        **common,
    )
    dq_win, *d_win_keys = window_attention_bwd(
        d_win, None, q, k_win, v_win, o_win, lse_win, window_size=config.window_size, **common
    )
    dq = (dq_cmp.to(wide) + dq_slc.to(wide) + dq_win.to(wide)).to(q.dtype)
    return dq, *d_cmp_keys, *d_slc_keys, *d_win_keys, dgates.to(gates.dtype)


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """Gated sum of the branches ``[..., H, Dv]`` with ``gates [..., H, 3]`` (eq. 5), as it is."""
    wide = compute_dtype(o_cmp)
    g_cmp, g_slc, g_win = gates.to(wide).unsqueeze(-1).unbind(-2)  # [..., H, 1] each
    return (g_cmp * o_cmp.to(wide) + g_slc * o_slc.to(wide) + g_win * o_win.to(wide)).to(
        o_cmp.dtype
    )
