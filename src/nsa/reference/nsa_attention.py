"""The whole of eq. 5 after projection and compression: three branches and their gated sum."""

from __future__ import annotations

from torch import Tensor

from nsa.config import NSAConfig
from nsa.reference.compressed_attention import compressed_attention_fwd
from nsa.reference.masked_attention import compute_dtype
from nsa.reference.select_blocks import select_blocks
from nsa.reference.selected_attention import selected_attention_fwd
from nsa.reference.window_attention import window_attention_fwd


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
    softmax_scale: float,
    cu_seqlens: Tensor | None = None,
    q_offset: int = 0,
) -> Tensor:
    """See ``nsa.ops.nsa_attention``; forward only."""
    common = {"softmax_scale": softmax_scale, "cu_seqlens": cu_seqlens, "q_offset": q_offset}
    o_cmp, lse = compressed_attention_fwd(
        q,
        k_cmp,
        v_cmp,
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        **common,
    )
    block_indices = select_blocks(q, k_cmp, lse, config=config, **common)
    o_slc, _ = selected_attention_fwd(
        q, k_slc, v_slc, block_indices, block_size=config.block_size, **common
    )
    o_win, _ = window_attention_fwd(q, k_win, v_win, window_size=config.window_size, **common)
    return combine(o_cmp, o_slc, o_win, gates)


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """Gated sum of the branches ``[..., H, Dv]`` with ``gates [..., H, 3]`` (eq. 5), as it is."""
    wide = compute_dtype(o_cmp)
    g_cmp, g_slc, g_win = gates.to(wide).unsqueeze(-1).unbind(-2)  # [..., H, 1] each
    return (g_cmp * o_cmp.to(wide) + g_slc * o_slc.to(wide) + g_win * o_win.to(wide)).to(
        o_cmp.dtype
    )
