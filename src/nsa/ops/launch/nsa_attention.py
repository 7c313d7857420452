"""Launches the whole of eq. 5: the choice of blocks, the three branches and their gated sum."""

from __future__ import annotations

from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops.launch.branches import Branch, Geometry
from nsa.ops.launch.compressed_attention import compressed_attention_fwd
from nsa.ops.launch.gradients import attention_bwd
from nsa.ops.launch.select_blocks import covers, select_blocks
from nsa.ops.launch.token_attention import token_attention_fwd


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
    """``(o, block_indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win)``, or ``(o,)``."""
    common = {"softmax_scale": softmax_scale, "cu_seqlens": cu_seqlens, "q_offset": q_offset}
    o_cmp, lse_cmp = _compressed(q, k_cmp, v_cmp, config, common)
    indices = select_blocks(q, k_cmp, lse_cmp, config=config, max_seqlen=max_seqlen, **common)
    out = token_attention_fwd(
        q,
        (k_slc, v_slc, None if covers(q, config, max_seqlen, q_offset) else indices),
        (k_win, v_win),
        gates,
        o_cmp,
        block_size=config.block_size,
        window_size=config.window_size,
        save=save,
        **common,
    )
    if not save:
        return (out["o"],)
    branches = (o_cmp, lse_cmp, out["o_slc"], out["lse_slc"], out["o_win"], out["lse_win"])
    return out["o"], indices, *branches


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
    """``(o_cmp, o_slc, o_win)`` of a choice already made."""
    common = {"softmax_scale": softmax_scale, "cu_seqlens": cu_seqlens, "q_offset": q_offset}
    o_cmp, _ = _compressed(q, k_cmp, v_cmp, config, common)
    out = token_attention_fwd(
        q,
        (k_slc, v_slc, None if covers(q, config, max_seqlen, q_offset) else block_indices),
        (k_win, v_win),
        block_size=config.block_size,
        window_size=config.window_size,
        **common,
    )
    return o_cmp, out["o_slc"], out["o_win"]


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
    """Gradients of the eight inputs in their order; ``saved`` is what followed ``o``."""
    indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win = saved
    geometry = Geometry(
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        block_size=config.block_size,
        window_size=config.window_size,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
        cu_seqlens=cu_seqlens,
    )
    chosen = None if covers(q, config, max_seqlen, q_offset) else indices
    branches = {
        "cmp": Branch(k=k_cmp, v=v_cmp, o=o_cmp, lse=lse_cmp),
        "slc": Branch(k=k_slc, v=v_slc, o=o_slc, lse=lse_slc, block_indices=chosen),
        "win": Branch(k=k_win, v=v_win, o=o_win, lse=lse_win),
    }
    grads = attention_bwd(do, q, branches, gates, geometry)
    keys = [grads[f"d{x}_{name}"] for name in branches for x in "kv"]
    return grads["dq"], *keys, grads["dgates"]


def _compressed(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, config: NSAConfig, common: dict
) -> tuple[Tensor, Tensor]:
    return compressed_attention_fwd(
        q,
        k_cmp,
        v_cmp,
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        **common,
    )
