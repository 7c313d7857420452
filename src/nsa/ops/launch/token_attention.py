"""Launches attention to tokens: selected blocks and window, alone or fused with the gated sum."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.kernels.token_attention import token_attention_fwd_kernel
from nsa.ops.launch import hopper_forward as hopper
from nsa.ops.launch.select_blocks import union_blocks
from nsa.ops.launch.tiles import (
    EVERYTHING,
    LOG2_E,
    QueryTiles,
    heads,
    key_tile,
    launch,
    reachable,
)
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
    # Of a branch that is not there, nothing is read or written: any tensor will do.
    k_slc, v_slc = (reachable(x, q, q_offset, 1, 1) for x in (slc or win or ())[:2])
    k_win, v_win = (reachable(x, q, q_offset, 1, 1) for x in win) if win else (k_slc, v_slc)
    indices = slc[2].contiguous() if slc and slc[2] is not None else None
    sizes = heads(q, k_slc, v_slc)
    out = _outputs(q, v_slc, gates is not None, save and slc is not None, save and win is not None)
    if q.numel() == 0:
        return out
    shape = tile("token_attention_fwd", sizes, q)
    keys = {"k_slc": k_slc, "v_slc": v_slc, "k_win": k_win, "v_win": v_win}
    on_hopper = hopper.has_token_attention(q, keys, block_size if slc else None, softmax_scale)
    rows = hopper.TOKEN_ROWS if on_hopper else shape.BM
    tiles = QueryTiles.of(q, cu_seqlens, rows // sizes["GP"])
    union = union_blocks(indices, q, tiles, turns=on_hopper)
    window_size = min(window_size, EVERYTHING)
    common = {
        "gates_ptr": q if gates is None else gates.contiguous(),
        "o_cmp_ptr": q if o_cmp is None else o_cmp,
        **_pointers(q, out),
        "blocks_ptr": union[0],
        "bits_ptr": union[1],
        "counts_ptr": union[2],
        "T_q": q.shape[-3],
        "T_k": k_slc.shape[-3],
        "q_offset": q_offset,
        "scale_log2": softmax_scale * LOG2_E,
    }
    flags = {
        "SLC": slc is not None,
        "ALL": indices is None,
        "WIN": win is not None,
        "COMBINE": gates is not None,
        "SAVE": save,
    }
    if on_hopper:
        hopper.token_attention_fwd(
            q, keys, tiles, window_size=window_size, common=common, flags=flags
        )
        return out
    shape = shape._replace(BN=key_tile(shape.BN, block_size) if slc else shape.BN)
    launch(
        token_attention_fwd_kernel,
        (tiles.num_tiles, sizes["K"]),
        q_ptr=q,
        **{f"{name}_ptr": x for name, x in keys.items()},
        **common,
        **tiles.arguments(),
        **sizes,
        SELECT=block_size,
        WINDOW=window_size,
        U=union[0].shape[-1],
        **flags,
        **shape._asdict(),
    )
    return out


def _outputs(q: Tensor, v: Tensor, gated: bool, slc: bool, win: bool) -> dict[str, Tensor]:
    """Those that are wanted: of the gated sum, of selected blocks, of the window."""
    out = {"o": q.new_empty(*q.shape[:-1], v.shape[-1])} if gated else {}
    for name, wanted in (("slc", slc), ("win", win)):
        if wanted:
            out[f"o_{name}"] = q.new_empty(*q.shape[:-1], v.shape[-1])
            out[f"lse_{name}"] = q.new_empty(q.shape[:-1], dtype=torch.float32)
    return out


def _pointers(q: Tensor, out: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kernel arguments of the outputs; those that are not wanted are not written."""
    pointers = {f"{name}_ptr": out.get(name, q) for name in ("o", "o_slc", "o_win")}
    for name, other in (("slc", "win"), ("win", "slc")):
        pointers[f"lse_{name}_ptr"] = out.get(f"lse_{name}", out.get(f"lse_{other}", q))
    return pointers
