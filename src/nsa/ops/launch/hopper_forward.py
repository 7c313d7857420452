"""Launches the Hopper kernels of compressed attention and block scores, where they apply."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.hopper_forward import hopper_attention_fwd_kernel
from nsa.kernels.hopper_scores import hopper_scores_kernel
from nsa.ops.launch.tiles import LOG2_E, QueryTiles, launch, next_power_of_2
from nsa.ops.launch.tuned import capability

DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
# Registers a thread with which the three warp groups start: 384 threads share 64 Ki.
START = {"num_warps": 4, "maxnreg": 168}


class HopperTile(NamedTuple):
    """Query rows of two warp groups, keys of a step, and places of the ring of keys."""

    BM: int
    BN: int
    STAGES: int


# Keys are given back a step late, so two places would leave no time for a copy.
ATTENTION = HopperTile(128, 128, 3)
SCORES = HopperTile(256, 64, 4)


def has_attention(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, softmax_scale: float) -> bool:
    """Whether ``attention_fwd`` applies; it takes the maximum of logits before it scales them."""
    group = q.shape[-2] // k_cmp.shape[-2]
    fits = group == next_power_of_2(group) <= ATTENTION.BM
    dims = q.shape[-1] in DIMS and v_cmp.shape[-1] in DIMS
    return fits and dims and softmax_scale > 0 and _can_copy(q, k_cmp, v_cmp)


def has_scores(q: Tensor, k_cmp: Tensor, keys_per_block: int) -> bool:
    """Whether ``block_scores`` applies; the sums of small groups would not fit the registers."""
    group = next_power_of_2(q.shape[-2] // k_cmp.shape[-2])
    whole = keys_per_block == next_power_of_2(keys_per_block) <= SCORES.BN
    return 8 <= group <= 64 and whole and q.shape[-1] in DIMS and _can_copy(q, k_cmp)


def _can_copy(*tensors: Tensor) -> bool:
    """Whether tensors are on a Hopper GPU and its copy engine can read them."""
    if capability(tensors[0]) != 9 or tensors[0].dtype not in DTYPES:
        return False
    return all(x.numel() > 0 and x.data_ptr() % 16 == 0 for x in tensors)


def _programs(device: torch.device, tiles: int) -> tuple[int]:
    """Programs that stay and share the tiles: one on each multiprocessor."""
    return (min(torch.cuda.get_device_properties(device).multi_processor_count, tiles),)


def _descriptor(x: Tensor, shape: tuple[int, ...], block: list[int]) -> TensorDescriptor:
    # Rows of a supported head dim fill the widest swizzle.
    layout = gl.NVMMASharedLayout(128, 8 * x.element_size(), len(block))
    return TensorDescriptor.from_tensor(x.view(shape), block, layout)


def attention_fwd(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    cu_seqlens: Tensor | None,
    geometry: dict[str, int],
    softmax_scale: float,
    tile: HopperTile = ATTENTION,
) -> None:
    """Writes ``o`` and ``lse``; ``geometry`` is ``BLOCK``, ``STRIDE`` and ``q_offset``."""
    num_heads, key_dim = q.shape[-2:]
    num_kv_heads, value_dim = v_cmp.shape[-2:]
    group = num_heads // num_kv_heads
    tiles = QueryTiles.of(q, cu_seqlens, tile.BM // group)
    launch(
        hopper_attention_fwd_kernel,
        _programs(q.device, tiles.num_tiles * num_kv_heads),
        q_desc=_descriptor(q, (-1, num_heads, key_dim), [tiles.tokens, group, key_dim]),
        k_desc=_descriptor(k_cmp, (-1, num_kv_heads * key_dim), [tile.BN, key_dim]),
        v_desc=_descriptor(v_cmp, (-1, num_kv_heads * value_dim), [tile.BN, value_dim]),
        o_ptr=o,
        lse_ptr=lse,
        **tiles.arguments(),
        num_tiles=tiles.num_tiles,
        T_q=q.shape[-3],
        T_c=k_cmp.shape[-3],
        scale_log2=softmax_scale * LOG2_E,
        H=num_heads,
        K=num_kv_heads,
        G=group,
        DK=key_dim,
        DV=value_dim,
        **geometry,
        **tile._asdict(),
        **START,
    )


def block_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    num_tiles: int,
    common: dict[str, Any],
    tile: HopperTile = SCORES,
) -> None:
    """Writes the sums of a chunk of tiles; ``common``: what ``select_blocks`` gives its kernels."""
    num_heads, key_dim = q.shape[-2:]
    num_kv_heads = k_cmp.shape[-2]
    group = num_heads // num_kv_heads
    launch(
        hopper_scores_kernel,
        _programs(q.device, num_tiles * num_kv_heads),
        k_desc=_descriptor(k_cmp, (-1, num_kv_heads * key_dim), [tile.BN, key_dim]),
        q_ptr=q,
        lse_ptr=lse,
        num_tiles=num_tiles,
        T_c=k_cmp.shape[-3],
        scale_log2=softmax_scale * LOG2_E,
        H=num_heads,
        K=num_kv_heads,
        G=group,
        GP=next_power_of_2(group),
        DK=key_dim,
        **common,
        **tile._asdict(),
        **START,
    )
