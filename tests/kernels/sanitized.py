"""One small case of every kernel, for compute-sanitizer: forward and backward of the whole op.

Shapes are odd, so that every tile has an edge. Run by ``test_sanitizer.py``.
"""

from __future__ import annotations

import torch

from nsa import NSAConfig, ops
from nsa.ops import CompressorWeights

PAPER = NSAConfig.paper()


def run(
    seq: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    cu_seqlens: list[int] | None = None,
    kind: str = "mlp",
) -> None:
    """Raises RuntimeError if a gradient is not finite."""
    torch.manual_seed(0)
    (num_heads, num_kv_heads), (key_dim, value_dim) = heads, dims

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device="cuda") * scale).to(dtype).requires_grad_()

    lead = (1, seq) if cu_seqlens is None else (seq,)
    q, gates = draw(*lead, num_heads, key_dim), draw(*lead, num_heads, 3)
    keys = [draw(*lead, num_kv_heads, key_dim) for _ in range(3)]
    values = [draw(*lead, num_kv_heads, value_dim) for _ in range(3)]
    phi = []
    for dim in dims:
        block = PAPER.compress_block_size
        shapes = {
            "mlp": ((num_kv_heads, block, dim), (dim, block * dim), (dim, dim)),
            "gated": ((num_kv_heads, block, dim), (dim, dim)),
        }.get(kind, ())
        phi.append([draw(*shape, scale=shape[-1] ** -0.5) for shape in shapes])
    packed = None
    if cu_seqlens is not None:
        packed = torch.tensor(cu_seqlens, dtype=torch.int32, device="cuda")
    compressed = ops.compress_kv(
        keys[0],
        values[0],
        *(CompressorWeights(*weights) for weights in phi),
        kind=kind,
        compress_block_size=PAPER.compress_block_size,
        compress_stride=PAPER.compress_stride,
        cu_seqlens=packed,
    )
    sides = (keys[1], values[1], keys[2], values[2])
    o = ops.nsa_attention(q, *compressed, *sides, gates, config=PAPER, cu_seqlens=packed)
    leaves = [q, *keys, *values, gates, *phi[0], *phi[1]]
    gradients = torch.autograd.grad(o.float().square().sum(), leaves)
    if not all(x.isfinite().all() for x in gradients):
        raise RuntimeError(f"{seq=} {heads=} {dims=} {dtype=}: a gradient is not finite")


def main() -> None:
    """All cases."""
    run(1101, (16, 1), (128, 128))
    run(301, (64, 1), (64, 64))
    run(1101, (16, 1), (192, 128), cu_seqlens=[0, 0, 1, 700, 1101])
    run(1101, (16, 2), (64, 64), kind="mean")
    run(1040, (12, 1), (96, 64), kind="gated")
    run(1040, (10, 2), (128, 64))
    run(1040, (4, 1), (64, 64), dtype=torch.float32)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
