"""Launches attention to tokens: selected blocks and window, alone or fused with the gated sum."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.kernels.token_attention import token_attention_fwd_kernel
from nsa.ops.launch.select_blocks import union_blocks
from nsa.ops.launch.tiles import LOG2_E, QueryTiles, heads, key_tile, launch
from nsa.ops.launch.tuned import tile


def token_attention_fwd(
    q: Tensor,
    slc: tuple[Tensor, Tensor, Tensor | None] | None,
    win: tuple[Tensor, Tensor] | None,
    gates: Tensor | None = None,
    o_cmp: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    block_size: int = 64,
    window_size: int = 1,
    softmax_scale: float,
    q_offset: int = 0,
    save: bool = True,
) -> dict[str, Tensor]:
    """``o`` (the gated sum, given gates), ``o_slc``, ``lse_slc``, ``o_win``, ``lse_win`` as asked.

    Args:
        q: queries.
        slc: keys, values and block indices of the selected branch; without indices every query
            selects all blocks up to its own.
        win: keys and values of the window branch.
        gates: for the gated sum, which takes both branches and ``o_cmp``.
        o_cmp: output of compressed attention.
        cu_seqlens: of packed sequences.
        block_size: tokens of a selection block.
        window_size: keys of the window.
        softmax_scale: factor of the logits.
        q_offset: position of the first query.
        save: whether to return branch outputs and log-sum-exps.
    """
    q = q.contiguous()
    k_slc, v_slc = (x.contiguous() for x in slc[:2]) if slc else (q, q)
    k_win, v_win = (x.contiguous() for x in win) if win else (q, q)
    indices = slc[2].contiguous() if slc and slc[2] is not None else None
    k, v = (k_slc, v_slc) if slc else (k_win, v_win)
    sizes = heads(q, k, v)
    shape = tile("token_attention_fwd", sizes, q)
    tiles = QueryTiles.of(q, cu_seqlens, shape.BM // sizes["GP"])

    def output(wanted: bool) -> Tensor | None:
        return q.new_empty(*q.shape[:-1], v.shape[-1]) if wanted else None

    def lse(wanted: bool) -> Tensor | None:
        return q.new_empty(q.shape[:-1], dtype=torch.float32) if wanted else None

    maybe = {
        "o": output(gates is not None),
        "o_slc": output(save and slc is not None),
        "o_win": output(save and win is not None),
        "lse_slc": lse(save and slc is not None),
        "lse_win": lse(save and win is not None),
    }
    out = {name: x for name, x in maybe.items() if x is not None}
    if q.numel() == 0:
        return out
    union = (q, q, q) if indices is None else union_blocks(indices, tiles, q.shape[-3])
    shape = shape._replace(BN=key_tile(shape.BN, block_size) if slc else shape.BN)
    launch(
        token_attention_fwd_kernel,
        (tiles.num_tiles, sizes["K"]),
        q_ptr=q,
        k_slc_ptr=k_slc,
        v_slc_ptr=v_slc,
        k_win_ptr=k_win,
        v_win_ptr=v_win,
        gates_ptr=q if gates is None else gates.contiguous(),
        o_cmp_ptr=q if o_cmp is None else o_cmp,
        **{f"{name}_ptr": out.get(name, q) for name in maybe},
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
        SLC=slc is not None,
        ALL=indices is None,
        WIN=win is not None,
        COMBINE=gates is not None,
        SAVE=save,
        **shape._asdict(),
    )
    return out
