"""Launches compressed attention, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.kernels.compressed_attention import compressed_attention_fwd_kernel
from nsa.ops.launch import hopper_forward
from nsa.ops.launch.branches import Branch, Geometry
from nsa.ops.launch.gradients import attention_bwd
from nsa.ops.launch.tiles import LOG2_E, QueryTiles, heads, launch, reachable
from nsa.ops.launch.tuned import tile


def compressed_attention_fwd(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    compress_block_size: int,
    compress_stride: int,
    softmax_scale: float,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """``(o, lse)``."""
    q = q.contiguous()
    k_cmp, v_cmp = (
        reachable(x, q, q_offset, compress_block_size, compress_stride) for x in (k_cmp, v_cmp)
    )
    o = q.new_empty(*q.shape[:-1], v_cmp.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if hopper_forward.has_attention(q, k_cmp, v_cmp, softmax_scale):
        hopper_forward.attention_fwd(
            q,
            k_cmp,
            v_cmp,
            o,
            lse,
            cu_seqlens=cu_seqlens,
            geometry={
                "BLOCK": compress_block_size,
                "STRIDE": compress_stride,
                "q_offset": q_offset,
            },
            softmax_scale=softmax_scale,
        )
        return o, lse
    sizes = heads(q, k_cmp, v_cmp)
    shape = tile("compressed_attention_fwd", sizes, q)
    tiles = QueryTiles.of(q, cu_seqlens, shape.BM // sizes["GP"])
    if q.numel() == 0:
        return o, lse
    launch(
        compressed_attention_fwd_kernel,
        (tiles.num_tiles, sizes["K"]),
        q_ptr=q,
        k_ptr=k_cmp,
        v_ptr=v_cmp,
        o_ptr=o,
        lse_ptr=lse,
        **tiles.arguments(),
        T_q=q.shape[-3],
        T_c=k_cmp.shape[-3],
        q_offset=q_offset,
        scale_log2=softmax_scale * LOG2_E,
        **sizes,
        BLOCK=compress_block_size,
        STRIDE=compress_stride,
        **shape._asdict(),
    )
    return o, lse


def compressed_attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    compress_block_size: int,
    compress_stride: int,
    softmax_scale: float,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk_cmp, dv_cmp)``."""
    geometry = Geometry(
        compress_block_size=compress_block_size,
        compress_stride=compress_stride,
        softmax_scale=softmax_scale,
        q_offset=q_offset,
        cu_seqlens=cu_seqlens,
    )
    branch = Branch(k=k_cmp, v=v_cmp, o=o, lse=lse)
    grads = attention_bwd(do, q, {"cmp": branch}, None, geometry, dlse)
    return grads["dq"], grads["dk_cmp"], grads["dv_cmp"]
