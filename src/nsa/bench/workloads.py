"""Input tensors of a measurement. What the queries look like decides how much neighbours share.

``random`` draws everything independently: neighbouring queries choose different blocks, the worst
case for a kernel that loads a block once for several queries. ``local`` lets queries drift slowly
over time, so that neighbours choose mostly the same blocks. Trained models lie in between.
``trace:FILE`` is what a layer of a trained model got, see ``nsa.bench.traces``. Results carry the
measured overlap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.bench import traces
from nsa.bench.shapes import Shape
from nsa.config import NSAConfig
from nsa.layers.rotary import rotate
from nsa.ops import CompressorWeights, compress_kv, compressed_attention, select_blocks

WORKLOADS = ("random", "local")
TRACE = "trace:"  # Before the path of a trace.
RHO = 0.99  # Correlation of neighbouring queries in the "local" workload.
COMPRESSORS = ("mlp", "mean")
WEIGHTS = ("pe", "w1", "w2")  # of a compressor, as ``CompressorWeights`` names them

Tensors = dict[str, Tensor]


def make_tensors(
    shape: Shape,
    seq_len: int,
    workload: str,
    dtype: torch.dtype,
    device: torch.device,
    compressor: str = "mlp",
) -> Tensors:
    """What a layer hands to the operations, the same for the same arguments.

    Returns:
        ``q``, the keys and values of each branch (``k_tokens``, ``v_tokens`` before compression,
        ``k_slc``, ...), ``gates``, and the weights of both compressors (``pe_k``, ``w1_k``,
        ``w2_k``, ``pe_v``, ...) unless the compressor is "mean". A trace adds ``cos_cmp`` and
        ``sin_cmp``, by which compressed keys are rotated.
    """
    if workload.startswith(TRACE):
        tensors = traces.tensors(workload.removeprefix(TRACE), seq_len, dtype, device)
    else:
        tensors = _draw(shape, seq_len, workload, dtype, device)
    return without_weights(tensors) if compressor == "mean" else tensors


def present(names: tuple[str, ...], tensors: Tensors) -> list[Tensor]:
    """Those of the named tensors that there are: some compressors have no weights."""
    return [tensors[name] for name in names if name in tensors]


def without_weights(tensors: Tensors) -> Tensors:
    """The same without those of the compressors, so that they are means."""
    weights = {f"{weight}_{side}" for weight in WEIGHTS for side in ("k", "v")}
    return {name: x for name, x in tensors.items() if name not in weights}


def _draw(
    shape: Shape, seq_len: int, workload: str, dtype: torch.dtype, device: torch.device
) -> Tensors:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    q = normal(1, seq_len, shape.num_heads, shape.key_dim)
    if workload == "local":
        q = correlate(q, RHO)
    # Each is narrowed at once: in float32 a million tokens would not fit beside each other.
    tensors = {"q": q.to(dtype)}
    del q
    for branch in ("tokens", "slc", "win"):
        for side, dim in (("k", shape.key_dim), ("v", shape.value_dim)):
            tensors[f"{side}_{branch}"] = normal(1, seq_len, shape.num_kv_heads, dim).to(dtype)
    tensors["gates"] = torch.sigmoid(normal(1, seq_len, shape.num_heads, 3)).to(dtype)
    block = shape.config.compress_block_size
    for side, dim in (("k", shape.key_dim), ("v", shape.value_dim)):
        pe = 0.02 * normal(shape.num_kv_heads, block, dim)
        w1, w2 = normal(dim, block * dim) / (block * dim) ** 0.5, normal(dim, dim) / dim**0.5
        tensors |= {
            f"{name}_{side}": x.to(dtype) for name, x in zip(WEIGHTS, (pe, w1, w2), strict=True)
        }
    return tensors


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
    """Both compressed tensors: by the "mlp" compressor, or by "mean" if there are no weights."""
    phi_k, phi_v = (
        CompressorWeights(*(tensors.get(f"{weight}_{side}") for weight in WEIGHTS))
        for side in ("k", "v")
    )
    k_cmp, v_cmp = compress_kv(
        tensors["k_tokens"],
        tensors["v_tokens"],
        phi_k,
        phi_v,
        kind="mean" if phi_k.w1 is None else "mlp",
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        backend=backend,
    )
    if "cos_cmp" in tensors:
        cos, sin = (tensors[name][:, : k_cmp.shape[1]] for name in ("cos_cmp", "sin_cmp"))
        k_cmp = rotate(k_cmp, cos, sin)
    return k_cmp, v_cmp


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
