"""Checks of the public edge: each ``ValueError`` says what was expected, what came, what to do."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from nsa.config import NSAConfig

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(x: Tensor) -> str:
    """``float32 [2, 8, 4, 64]``."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def scale(softmax_scale: float | None, head_dim: int) -> float:
    """The given scale, or ``1 / sqrt(head_dim)``."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim)
    # Of a tensor it would wait for the device.
    if not isinstance(softmax_scale, int | float) or not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale: expected a finite float, got {softmax_scale!r}.")
    return float(softmax_scale)


def readable(x: Tensor) -> bool:
    """Whether values can be read: on a GPU that would wait for it, while tracing there are none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_whole(x: object) -> bool:
    """An int, or one that a traced graph leaves open."""
    return isinstance(x, int | torch.SymInt) and not isinstance(x, bool)


def tensor(name: str, x: object) -> None:
    """A tensor, not a list or an array."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}.")


def mode(name: str, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Rank 4 is a batch, rank 3 is packed with ``cu_seqlens``; only tokens may be none at all."""
    tensor(name, x)
    if x.layout != torch.strided:
        raise ValueError(
            f"{name}: expected a dense (strided) tensor, got layout {x.layout}. Call .to_dense()."
        )
    if x.dtype not in FLOATS:
        raise ValueError(
            f"{name}: expected a floating dtype, got {describe(x)}. Cast it, for "
            "example with .float()."
        )
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{name}: expected [batch, seq, heads, dim], or [tokens, heads, dim] with cu_seqlens, "
            f"got {describe(x)}."
        )
    if 0 in x.shape[-2:]:
        raise ValueError(f"{name}: expected at least one head and one channel, got {describe(x)}.")
    if x.dim() == 4 and cu_seqlens is not None:
        raise ValueError(
            f"cu_seqlens: expected None with a batch, but {name} is {describe(x)}. Drop "
            "cu_seqlens, or pack the sequences into [tokens, heads, dim]."
        )
    if x.dim() == 4 and x.shape[0] == 0:
        raise ValueError(
            f"{name}: expected at least one sequence, got an empty batch, {describe(x)}."
        )
    if x.dim() == 3:
        packed_lengths(cu_seqlens, name, x)


def packed_lengths(cu_seqlens: Tensor | None, name: str, x: Tensor) -> None:
    """int32 ``[num_seqs + 1]``, from 0 to the number of tokens, not decreasing, if ``readable``."""
    num_tokens = x.shape[0]
    if cu_seqlens is None:
        raise ValueError(
            f"cu_seqlens: required, because {name} is packed, {describe(x)}. Pass int32 "
            "[num_seqs + 1], or a batch of rank 4."
        )
    tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "cu_seqlens: expected int32 [num_seqs + 1] with at least one sequence, got "
            f"{describe(cu_seqlens)}. Cast it with .int()."
        )
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"cu_seqlens: expected on {x.device} like {name}, got {cu_seqlens.device}. Move it "
            "with .to()."
        )
    if not readable(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(
            "cu_seqlens: expected to start at 0 and to end at the number of tokens = "
            f"{num_tokens}, got {bounds[0]} and {bounds[-1]}."
        )
    if any(b < a for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens: expected values that never decrease, got {bounds}.")


def queries(q: Tensor, cu_seqlens: Tensor | None, q_offset: int) -> None:
    """Queries are a batch or packed; an offset is for batches only."""
    mode("q", q, cu_seqlens)
    if not _is_whole(q_offset) or q_offset < 0 or (q_offset and q.dim() == 3):
        raise ValueError(
            "q_offset: expected an int, 0 with packed sequences and at least 0 with a batch, "
            f"got {q_offset!r}."
        )


def longest(max_seqlen: int | None, cu_seqlens: Tensor | None) -> None:
    """Of packed sequences only, and no less than the lengths say, if those are ``readable``."""
    if max_seqlen is None:
        return
    if not _is_whole(max_seqlen) or max_seqlen < 0 or cu_seqlens is None:
        raise ValueError(
            "max_seqlen: expected an int of at least 0 with packed sequences and None with a "
            f"batch, got {max_seqlen!r}."
        )
    if readable(cu_seqlens):
        found = int(cu_seqlens.diff().max())
        if found > max_seqlen:
            raise ValueError(
                f"max_seqlen: expected at least {found}, the longest sequence of cu_seqlens, got "
                f"{max_seqlen}."
            )


def same_kind(name: str, x: Tensor, q: Tensor, like: str = "q") -> None:
    """Same rank, dtype, device and batch as the tensor that the caller knows as ``like``."""
    tensor(name, x)
    if x.dim() != q.dim():
        raise ValueError(
            f"{name}: expected rank {q.dim()} like {like}, {describe(q)}, got {describe(x)}."
        )
    if x.dtype != q.dtype:
        raise ValueError(
            f"{name}: expected {q.dtype} like {like}, got {x.dtype}. Cast it with "
            f".to({like}.dtype)."
        )
    if x.device != q.device:
        raise ValueError(
            f"{name}: expected on {q.device} like {like}, got {x.device}. Move it with "
            f".to({like}.device)."
        )
    if x.dim() == 4 and x.shape[0] != q.shape[0]:
        raise ValueError(f"{name}: expected batch {q.shape[0]} like {like}, got {describe(x)}.")


def keys_values(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str]) -> None:
    """Keys and values fit each other and q: ``[batch, keys, kv_heads, Dk]`` and ``[..., Dv]``."""
    for name, x in zip(names, (k, v), strict=True):
        same_kind(name, x, q)
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{names[1]}: expected {list(k.shape[:-1])} + [dim] like {names[0]}, got {describe(v)}."
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{names[0]}: expected head dim {q.shape[-1]} like q, got {describe(k)}.")
    num_heads, num_kv_heads = q.shape[-2], k.shape[-2]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"{names[0]}: expected a number of kv heads that divides the {num_heads} query heads, "
            f"got {num_kv_heads}. The layout is [batch, seq, heads, dim]."
        )


def token_keys(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str], q_offset: int) -> None:
    """Keys and values hold one entry per token, up to the last query at least."""
    keys_values(q, k, v, names)
    needed = q_offset + q.shape[-3]
    if (q.dim() == 3 and k.shape[0] != needed) or k.shape[-3] < needed:
        exact = "exactly" if q.dim() == 3 else "at least"
        raise ValueError(
            f"{names[0]}: expected {exact} {needed} keys, since queries reach position q_offset + "
            f"seq - 1 = {needed - 1}, got {describe(k)}. The layout is [batch, seq, heads, dim]."
        )


def compressed_keys(
    q: Tensor, num_compressed: int, name: str, x: Tensor, q_offset: int, block: int, stride: int
) -> None:
    """Enough compressed blocks for the queries; packed: one slot per ``stride`` tokens."""
    if q.dim() == 3:
        expected = q.shape[0] // stride
        if num_compressed != expected:
            raise ValueError(
                f"{name}: expected total_tokens // compress_stride = {expected} slots for packed "
                f"sequences, got {describe(x)}. Make it with nsa.compress_kv."
            )
        return
    tokens = q_offset + q.shape[1]
    expected = 0 if tokens < block else (tokens - block) // stride + 1
    if num_compressed < expected:
        raise ValueError(
            f"{name}: expected at least {expected} compressed blocks for {tokens} tokens, got "
            f"{describe(x)}. Make it with nsa.compress_kv."
        )


def geometry(compress_block_size: int, compress_stride: int) -> None:
    """Positive, the stride divides the block."""
    positive("compress_block_size", compress_block_size)
    positive("compress_stride", compress_stride)
    if compress_block_size % compress_stride:
        raise ValueError(
            "compress_stride: expected a divisor of compress_block_size = "
            f"{compress_block_size}, got {compress_stride}."
        )


def positive(name: str, value: int) -> None:
    """A size of at least one token."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}.")


def flag(name: str, value: bool) -> None:
    """True or False, not a word that says so."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}.")


def indices(block_indices: Tensor, q: Tensor, k: Tensor) -> None:
    """int32 ``[batch, seq, kv_heads, n]``, or packed ``[tokens, kv_heads, n]``."""
    tensor("block_indices", block_indices)
    expected = [*q.shape[:-2], k.shape[-2]]
    if (
        block_indices.dtype != torch.int32
        or block_indices.dim() != q.dim()
        or list(block_indices.shape[:-1]) != expected
        or block_indices.shape[-1] == 0
    ):
        raise ValueError(
            f"block_indices: expected int32 {expected} + [n], n at least 1, got "
            f"{describe(block_indices)}. Make them with nsa.select_blocks, or cast with .int()."
        )
    if block_indices.device != q.device:
        raise ValueError(
            f"block_indices: expected on {q.device} like q, got {block_indices.device}."
        )


def gates(gates_: Tensor, q: Tensor) -> None:
    """``[batch, seq, heads, 3]`` in the order cmp, slc, win."""
    tensor("gates", gates_)
    if list(gates_.shape) != [*q.shape[:-1], 3]:
        raise ValueError(
            f"gates: expected {[*q.shape[:-1], 3]}, one gate per branch in the order cmp, slc, "
            f"win, got {describe(gates_)}."
        )
    same_kind("gates", gates_, q)


def value_dims(v_cmp: Tensor, v_slc: Tensor, v_win: Tensor) -> None:
    """One head dim for the values of all branches."""
    if not v_cmp.shape[-1] == v_slc.shape[-1] == v_win.shape[-1]:
        raise ValueError(
            "v_cmp, v_slc, v_win: expected one head dim, since the branch outputs are added, got "
            f"{v_cmp.shape[-1]}, {v_slc.shape[-1]} and {v_win.shape[-1]}."
        )


def config(value: NSAConfig) -> None:
    """An NSAConfig, not a dict or a model config."""
    if not isinstance(value, NSAConfig):
        raise ValueError(f"config: expected an nsa.NSAConfig, got {type(value).__name__}.")


def log_sum_exp(lse: Tensor, q: Tensor) -> None:
    """float32 (float64 for float64 queries) ``[batch, seq, heads]``."""
    tensor("lse", lse)
    expected = torch.promote_types(q.dtype, torch.float32)
    if lse.dtype != expected or lse.shape != q.shape[:-1] or lse.device != q.device:
        raise ValueError(
            f"lse: expected {expected} {list(q.shape[:-1])} on {q.device}, got {describe(lse)} on "
            f"{lse.device}. Take it from nsa.compressed_attention."
        )
