"""Launches the Hopper kernels of the forward, where they apply."""

from __future__ import annotations

from functools import cache
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.kernels.hopper_compressed_attention import hopper_attention_fwd_kernel
from nsa.kernels.hopper_scores import hopper_scores_kernel
from nsa.kernels.hopper_token_attention import hopper_token_attention_fwd_kernel
from nsa.ops.launch.tiles import (
    LOG2_E,
    QueryTiles,
    launch,
    next_power_of_2,
    rows_a_token,
)
from nsa.ops.launch.tuned import capability

KEY_DIMS, VALUE_DIMS = (64, 128, 192), (64, 128)
ROWS_A_TOKEN = (8, 16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16)
# Registers a thread with which the three warp groups start: 384 threads share 64 Ki.
START = {"num_warps": 4, "maxnreg": 168}


class HopperTile(NamedTuple):
    """Query rows of two warp groups, keys of a step, and places of the ring of keys."""

    BM: int
    BN: int
    STAGES: int


ATTENTION_ROWS = 128
SCORES = HopperTile(256, 64, 4)
# Of tokens, a step has the keys of a selection block, and the ring takes what the queries leave.
TOKEN_ROWS, TOKEN_KEYS, MAX_STAGES = 128, 64, 8
SHARED_MEMORY = 226 * 1024  # Bytes of a multiprocessor, less what barriers take.


def has_attention(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, softmax_scale: float) -> bool:
    """Whether ``attention_fwd`` applies; it takes the maximum of logits before it scales them."""
    fits = rows_a_token(q, k_cmp) <= ATTENTION_ROWS
    dims = q.shape[-1] in KEY_DIMS and v_cmp.shape[-1] in VALUE_DIMS
    return fits and dims and softmax_scale > 0 and can_copy(q, k_cmp, v_cmp)


def has_scores(q: Tensor, k_cmp: Tensor, keys_per_block: int) -> bool:
    """Whether ``block_scores`` applies; the sums of small groups would not fit the registers."""
    fits = rows_a_token(q, k_cmp) in ROWS_A_TOKEN
    whole = keys_per_block == next_power_of_2(keys_per_block) <= SCORES.BN
    return fits and whole and q.shape[-1] in KEY_DIMS and can_copy(q, k_cmp)


def piece(dim: int) -> int:
    """Columns of a head dim that lie together in shared memory, whose shapes are powers of two."""
    return dim if dim == next_power_of_2(dim) else 64


def has_token_attention(
    q: Tensor, keys: dict[str, Tensor], block_size: int | None, softmax_scale: float
) -> bool:
    """Whether ``token_attention_fwd`` applies; without selected blocks they have no size."""
    return block_size in (None, TOKEN_KEYS) and softmax_scale > 0 and takes(q, *keys.values())


def takes(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    """Hopper, 16-bit, head dims of whole pieces, groups whose rows fill the swizzle's pattern.

    A group of 5 heads has 8 rows, and so on: what is copied into the others counts for nothing. All
    tensors, ``others`` as well, are such that the copy engine can read them.
    """
    return (
        rows_a_token(q, k) in ROWS_A_TOKEN
        and q.shape[-1] in KEY_DIMS
        and v.shape[-1] in VALUE_DIMS
        and can_copy(q, k, v, *others)
    )


def can_copy(*tensors: Tensor) -> bool:
    """Whether tensors are on a Hopper GPU and its copy engine can read them."""
    if capability(tensors[0]) != 9 or tensors[0].dtype not in DTYPES:
        return False
    return all(x.numel() > 0 and x.data_ptr() % 16 == 0 for x in tensors)


def programs(device: torch.device, tiles: int) -> tuple[int]:
    """Programs that stay and share the tiles: one on each multiprocessor."""
    return (min(_multiprocessors(device), tiles),)


def whole_rounds(tiles: int, num_kv_heads: int, device: torch.device) -> int:
    """At most ``tiles``, as many as give every multiprocessor the same number of them."""
    count = _multiprocessors(device)
    unit = count // gcd(count, num_kv_heads)
    return tiles // unit * unit or tiles


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def descriptor(x: Tensor, shape: tuple[int, ...], block: list[int]) -> TensorDescriptor:
    """How the copy engine reads contiguous ``x``, viewed as ``shape``, in tiles of ``block``."""
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    sizes = [x.numel() // strides[0], *shape[1:]]
    return TensorDescriptor(x, sizes, strides, block, _layout(8 * x.element_size(), len(block)))


@cache
def _layout(bits: int, rank: int) -> gl.NVMMASharedLayout:
    """Rows of a supported head dim fill the widest swizzle."""
    return gl.NVMMASharedLayout(128, bits, rank)


def attention_tile(key_dim: int, value_dim: int) -> HopperTile:
    """The tile of compressed attention: steps of 128 keys, and what the queries leave for rings."""
    free = SHARED_MEMORY - ATTENTION_ROWS * key_dim * 2
    return HopperTile(ATTENTION_ROWS, 128, min(3, free // (128 * (key_dim + value_dim) * 2)))


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
) -> None:
    """Writes ``o`` and ``lse``; ``geometry`` is ``BLOCK``, ``STRIDE`` and ``q_offset``."""
    num_heads, key_dim = q.shape[-2:]
    num_kv_heads, value_dim = v_cmp.shape[-2:]
    group = num_heads // num_kv_heads
    rows = rows_a_token(q, k_cmp)
    tile = attention_tile(key_dim, value_dim)
    columns = piece(key_dim)
    tiles = QueryTiles.of(q, cu_seqlens, tile.BM // rows)
    launch(
        hopper_attention_fwd_kernel,
        programs(q.device, tiles.num_tiles * num_kv_heads),
        q_desc=descriptor(q, (-1, num_heads, key_dim), [tiles.tokens, rows, columns]),
        k_desc=descriptor(k_cmp, (-1, num_kv_heads * key_dim), [tile.BN, columns]),
        v_desc=descriptor(v_cmp, (-1, num_kv_heads * value_dim), [tile.BN, value_dim]),
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
        GP=rows,
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
) -> None:
    """Writes the sums of a chunk of tiles; ``common``: what ``select_blocks`` gives its kernels."""
    num_heads, key_dim = q.shape[-2:]
    num_kv_heads = k_cmp.shape[-2]
    group = num_heads // num_kv_heads
    launch(
        hopper_scores_kernel,
        programs(q.device, num_tiles * num_kv_heads),
        k_desc=descriptor(k_cmp, (-1, num_kv_heads * key_dim), [SCORES.BN, piece(key_dim)]),
        q_ptr=q,
        lse_ptr=lse,
        num_tiles=num_tiles,
        T_c=k_cmp.shape[-3],
        scale_log2=softmax_scale * LOG2_E,
        H=num_heads,
        K=num_kv_heads,
        G=group,
        GP=rows_a_token(q, k_cmp),
        DK=key_dim,
        **common,
        **SCORES._asdict(),
        **START,
    )


def token_attention_fwd(
    q: Tensor,
    keys: dict[str, Tensor],
    tiles: QueryTiles,
    *,
    window_size: int,
    common: dict[str, Any],
    flags: dict[str, bool],
) -> None:
    """Writes the outputs in ``common``: what ``nsa.ops.launch.token_attention`` gives its kernels.

    ``keys`` are ``k_slc``, ``v_slc``, ``k_win`` and ``v_win``, ``flags`` those of the plain kernel.
    """
    num_heads, key_dim = q.shape[-2:]
    num_kv_heads, value_dim = keys["v_slc"].shape[-2:]
    group = num_heads // num_kv_heads
    rows = rows_a_token(q, keys["k_slc"])
    columns = piece(key_dim)
    free = SHARED_MEMORY - TOKEN_ROWS * key_dim * 2
    stages = min(MAX_STAGES, free // (TOKEN_KEYS * (key_dim + value_dim) * 2))
    descriptors = {
        f"{name}_desc": descriptor(
            x, (-1, num_kv_heads * x.shape[-1]), [TOKEN_KEYS, piece(x.shape[-1])]
        )
        for name, x in keys.items()
    }
    launch(
        hopper_token_attention_fwd_kernel,
        programs(q.device, tiles.num_tiles * num_kv_heads),
        q_desc=descriptor(q, (-1, num_heads, key_dim), [tiles.tokens, rows, columns]),
        **descriptors,
        **common,
        **tiles.places(),
        num_tiles=tiles.num_tiles,
        K=num_kv_heads,
        window=window_size,
        num_entries=common["blocks_ptr"].shape[-1],
        SHAPE=(group, key_dim, value_dim, columns, stages, *flags.values(), tiles.packed, rows),
        **START,
    )
