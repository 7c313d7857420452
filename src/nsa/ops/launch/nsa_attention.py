"""Launches selected and window attention, alone or fused with the gated sum."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.kernels.nsa_attention import selected_window_fwd_kernel
from nsa.ops.launch.select_blocks import union_blocks
from nsa.ops.launch.tiles import LOG2_E, QueryTiles, heads, launch


def selected_window_fwd(
    q: Tensor,
    slc: tuple[Tensor, Tensor, Tensor] | None,
    win: tuple[Tensor, Tensor] | None,
    gates: Tensor | None = None,
    o_cmp: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    block_size: int,
    window_size: int,
    softmax_scale: float,
    q_offset: int = 0,
    save: bool = True,
    BM=64,
    BN=64,
    num_warps=4,
    num_stages=2,
) -> dict[str, Tensor | None]:
    """o, o_slc, lse_slc, o_win, lse_win: those asked for."""
    q = q.contiguous()
    k_slc, v_slc, indices = (x.contiguous() for x in slc) if slc else (q, q, q)
    k_win, v_win = (x.contiguous() for x in win) if win else (q, q)
    k, v = (k_slc, v_slc) if slc else (k_win, v_win)
    combine = gates is not None
    sizes = heads(q, k, v)
    tiles = QueryTiles.of(q, cu_seqlens, BM // sizes["GP"])

    def output(wanted: bool) -> Tensor | None:
        return q.new_empty(*q.shape[:-1], v.shape[-1]) if wanted else None

    def lse(wanted: bool) -> Tensor | None:
        return q.new_empty(q.shape[:-1], dtype=torch.float32) if wanted else None

    out = {
        "o": output(combine),
        "o_slc": output(save and bool(slc)),
        "o_win": output(save and bool(win)),
        "lse_slc": lse(save and bool(slc)),
        "lse_win": lse(save and bool(win)),
    }
    if q.numel() == 0:
        return out
    union = union_blocks(indices, tiles, q.shape[-3]) if slc else (q, q, q)
    BN = min(BN, block_size) if slc else BN
    launch(
        selected_window_fwd_kernel,
        (tiles.num_tiles, sizes["K"]),
        q_ptr=q,
        k_slc_ptr=k_slc,
        v_slc_ptr=v_slc,
        k_win_ptr=k_win,
        v_win_ptr=v_win,
        gates_ptr=gates if combine else q,
        o_cmp_ptr=o_cmp if combine else q,
        **{f"{name}_ptr": q if x is None else x for name, x in out.items()},
        blocks_ptr=union[0],
        bits_ptr=union[1],
        counts_ptr=union[2],
        **tiles.arguments(),
        T_q=q.shape[-3],
        T_k=k.shape[-3],
        q_offset=q_offset,
        scale_log2=softmax_scale * LOG2_E,
        **sizes,
        SELECT=block_size,
        WINDOW=window_size,
        U=union[0].shape[-1],
        BM=BM,
        BN=BN,
        SLC=bool(slc),
        WIN=bool(win),
        COMBINE=combine,
        SAVE=save,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out
