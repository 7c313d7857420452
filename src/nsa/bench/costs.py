"""How much work an operation is: flops (a multiply-add is two) and bytes that must move.

Attention counts the pairs of query and key that the definition makes visible, not what an
implementation computes
besides: forward ``2 pairs heads (Dk + Dv)``, backward ``2 pairs heads (3 Dk + 2 Dv)`` (the scores
    once more, and one
product for each of dp, dq, dk and dv). Softmax, gates and sums are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.bench.operations import OPERATIONS
from nsa.bench.shapes import Shape
from nsa.bench.workloads import Tensors, present
from nsa.config import NSAConfig


def num_flops(
    operation: str, mode: str, shape: Shape, seq_len: int, compressor: str | None = "mlp"
) -> int:
    """Floating point operations of one call; what is computed again to save memory is not counted.

    Args:
        operation: name in ``OPERATIONS``.
        mode: "forward" or "backward".
        shape: with the geometry that the operation runs with.
        seq_len: tokens.
        compressor: "mlp" with as many hidden units as the head is wide, or "mean".
    """
    if operation == "select_blocks":
        return 2 * visible_pairs("compressed", shape, seq_len) * shape.num_heads * shape.key_dim
    if operation == "compress_kv":
        return _compress_flops(mode, shape, seq_len, compressor)
    if operation in ("nsa_attention", "pipeline", "recompute_pipeline", "shared_pipeline"):
        parts = ["compressed_attention", "selected_attention", "window_attention"]
        parts += ["select_blocks"] if mode == "forward" else []
        parts += ["compress_kv"] if operation != "nsa_attention" else []
        return sum(num_flops(part, mode, shape, seq_len, compressor) for part in parts)
    if operation == "nsa_decode":
        keys = sum(_last_query(branch, shape, seq_len) for branch in BRANCHES)
        scores = _last_query("compressed", shape, seq_len) * shape.key_dim
        return 2 * shape.num_heads * (keys * (shape.key_dim + shape.value_dim) + scores)
    if operation == "dense_decode":
        return 2 * shape.num_heads * seq_len * (shape.key_dim + shape.value_dim)
    pairs = visible_pairs(operation.removesuffix("_attention"), shape, seq_len)
    k_products, v_products = (1, 1) if mode == "forward" else (3, 2)
    widths = k_products * shape.key_dim + v_products * shape.value_dim
    return 2 * pairs * shape.num_heads * widths


def num_bytes(
    operation: str, mode: str, shape: Shape, tensors: Tensors, outputs: tuple[Tensor, ...]
) -> int:
    """Bytes of everything one call must read and write, each tensor once.

    Forward: inputs and outputs. Backward: inputs, outputs and their gradients in, gradients of the
    leaves out. Decoding: the keys and values that the last query sees.
    """
    entry, seq_len = OPERATIONS[operation], tensors["q"].shape[1]
    if operation in ("nsa_decode", "dense_decode"):
        branches = BRANCHES if operation == "nsa_decode" else ("dense",)
        keys = sum(_last_query(branch, shape, seq_len) for branch in branches)
        item_bytes = tensors["q"].element_size()
        return keys * shape.num_kv_heads * (shape.key_dim + shape.value_dim) * item_bytes
    reads = sum(x.nbytes for x in present(entry.reads, tensors))
    made = sum(x.nbytes for x in outputs)
    if mode == "forward":
        return reads + made
    return reads + 2 * made + sum(x.nbytes for x in present(entry.leaves, tensors))


BRANCHES = ("compressed", "selected", "window")


def visible_pairs(branch: str, shape: Shape, seq_len: int) -> int:
    """Pairs of query and key of one head: ``compressed``, ``selected``, ``window`` or ``dense``."""
    return int(_visible(branch, shape.config, torch.arange(seq_len)).sum())


def _last_query(branch: str, shape: Shape, seq_len: int) -> int:
    return int(_visible(branch, shape.config, torch.tensor([seq_len - 1])))


def _visible(branch: str, config: NSAConfig, position: Tensor) -> Tensor:
    """Keys that the query at each position sees."""
    if branch == "dense":
        return position + 1
    if branch == "window":
        return (position + 1).clamp(max=config.window_size)
    if branch == "compressed":
        past = position + 1 - config.compress_block_size
        return torch.where(past < 0, 0, past // config.compress_stride + 1)
    assert branch == "selected", f"unknown branch {branch!r}"
    # All chosen blocks are whole but the query's own, which is always chosen unless no block is
    # forced to be local.
    own = position // config.block_size
    others = torch.minimum(own, torch.tensor(config.num_selected_blocks - 1))
    return others * config.block_size + position % config.block_size + 1


def _compress_flops(mode: str, shape: Shape, seq_len: int, compressor: str | None) -> int:
    blocks = shape.config.num_compressed(seq_len) * shape.num_kv_heads
    if compressor == "mean":
        return blocks * shape.config.compress_block_size * (shape.key_dim + shape.value_dim)
    first, second = (1, 1) if mode == "forward" else (3, 2)
    size = shape.config.compress_block_size
    per_block = sum(
        first * size * dim * dim + second * dim * dim for dim in (shape.key_dim, shape.value_dim)
    )
    return 2 * blocks * per_block
