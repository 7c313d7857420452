"""Input tensors of a measurement. What the queries look like decides how much neighbours share.

``random`` draws everything independently: neighbouring queries choose different blocks, the worst
case for a kernel that loads a block once for several queries. ``local`` lets queries drift slowly
over time, as those of trained models do, so that neighbours choose mostly the same blocks. Results
carry the measured overlap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.bench.shapes import Shape
from nsa.config import NSAConfig
from nsa.ops import CompressorWeights, compress_kv, compressed_attention, select_blocks

WORKLOADS = ("random", "local")
RHO = 0.99  # Correlation of neighbouring queries in the "local" workload.

Tensors = dict[str, Tensor]


def make_tensors(
    shape: Shape, seq_len: int, workload: str, dtype: torch.dtype, device: torch.device
) -> Tensors:
    """Draws what a layer hands to the operations, the same for the same arguments.

    Returns:
        ``q``, the keys and values of each branch (``k_tokens``, ``v_tokens`` before compression,
        ``k_slc``, ...), ``gates``, and the weights of both compressors (``pe_k``, ``w1_k``,
        ``w2_k``, ``pe_v``, ...).
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    tensors = {"q": normal(1, seq_len, shape.num_heads, shape.key_dim)}
    if workload == "local":
        tensors["q"] = correlate(tensors["q"], RHO)
    for branch in ("tokens", "slc", "win"):
        tensors[f"k_{branch}"] = normal(1, seq_len, shape.num_kv_heads, shape.key_dim)
        tensors[f"v_{branch}"] = normal(1, seq_len, shape.num_kv_heads, shape.value_dim)
    tensors["gates"] = torch.sigmoid(normal(1, seq_len, shape.num_heads, 3))
    block = shape.config.compress_block_size
    for side, dim in (("k", shape.key_dim), ("v", shape.value_dim)):
        tensors[f"pe_{side}"] = 0.02 * normal(shape.num_kv_heads, block, dim)
        tensors[f"w1_{side}"] = normal(dim, block * dim) / (block * dim) ** 0.5
        tensors[f"w2_{side}"] = normal(dim, dim) / dim**0.5
    return {name: x.to(dtype) for name, x in tensors.items()}


def correlate(noise: Tensor, rho: float) -> Tensor:
    """Turns noise ``[batch, seq, ...]`` into an AR(1) process over seq; both of unit variance.

    ``x_t = rho x_(t-1) + sqrt(1 - rho^2) noise_t``, summed by doubling: each pass adds what lies
    twice as far back.
    """
    x = noise * (1 - rho**2) ** 0.5
    x[:, :1] = noise[:, :1]
    shift = 1
    while shift < x.shape[1]:
        x[:, shift:] = x[:, shift:] + rho**shift * x[:, :-shift]
        shift *= 2
    return x


def add_selection(tensors: Tensors, config: NSAConfig, backend: str) -> Tensors:
    """Adds what later operations read: ``k_cmp``, ``v_cmp``, ``lse`` and ``block_indices``."""
    with torch.no_grad():
        k_cmp, v_cmp = run_compress(tensors, config, backend)
        _, lse = compressed_attention(
            tensors["q"],
            k_cmp,
            v_cmp,
            compress_block_size=config.compress_block_size,
            compress_stride=config.compress_stride,
            backend=backend,
        )
        block_indices = select_blocks(tensors["q"], k_cmp, lse, config=config, backend=backend)
    made = {"k_cmp": k_cmp, "v_cmp": v_cmp, "lse": lse, "block_indices": block_indices}
    return {**tensors, **made}


def run_compress(tensors: Tensors, config: NSAConfig, backend: str) -> tuple[Tensor, Tensor]:
    """Both compressed tensors, by the default kind of compressor ("mlp")."""
    phi_k, phi_v = (
        CompressorWeights(*(tensors[f"{weight}_{side}"] for weight in ("pe", "w1", "w2")))
        for side in ("k", "v")
    )
    return compress_kv(
        tensors["k_tokens"],
        tensors["v_tokens"],
        phi_k,
        phi_v,
        kind="mlp",
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        backend=backend,
    )


def overlap(block_indices: Tensor) -> float | None:
    """Share of a query's blocks that the query before it chose too, over full lists only.

    Args:
        block_indices: int32 ``[batch, seq, kv_heads, n]``, -1 for unused slots.

    Returns:
        A number from 0 to 1, or None if no two neighbouring queries have a full list.
    """
    shared = total = 0
    # Chunks keep the comparison [seq, kv_heads, n, n] small at a million tokens.
    for before, after in zip(
        block_indices[:, :-1].split(8192, dim=1),
        block_indices[:, 1:].split(8192, dim=1),
        strict=True,
    ):
        full = (before[..., -1] >= 0) & (after[..., -1] >= 0)
        same = (before[full][:, :, None] == after[full][:, None, :]).sum()
        shared += int(same)
        total += int(full.sum()) * block_indices.shape[-1]
    return shared / total if total else None
