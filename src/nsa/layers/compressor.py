"""phi of eq. 7 as a module: the weights that turn a block of keys (or values) into one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsa import ops
from nsa.ops import CompressorWeights
from nsa.ops.compress_kv import KINDS


class Compressor(nn.Module):
    """Compresses keys and values, each with a phi that all kv heads share but for its positions.

    Every kind starts as exact mean pooling. The forms are those of ``nsa.compress_kv``.

    Args:
        kind: "mlp", "linear", "gated" or "mean".
        num_kv_heads: heads of keys and values.
        key_dim: channels of a key (Dk).
        value_dim: channels of a value (Dv).
        compress_block_size: tokens per block (l).
        compress_stride: tokens between blocks (d).
        hidden_size: hidden units of the "mlp"; the head's own width if None.

    Raises:
        ValueError: the kind is unknown, or ``hidden_size`` is given for a kind that has no hidden
            units.
    """

    def __init__(
        self,
        kind: str,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        compress_block_size: int,
        compress_stride: int,
        hidden_size: int | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"compressor: expected one of {', '.join(KINDS)}, got {kind!r}.")
        if hidden_size is not None and kind != "mlp":
            raise ValueError(
                f"hidden_size: expected None, since compressor {kind!r} has no hidden units, got "
                f"{hidden_size}. Use it with 'mlp'."
            )
        self.kind = kind
        self.compress_block_size = compress_block_size
        self.compress_stride = compress_stride
        for side, dim in (("k", key_dim), ("v", value_dim)):
            for name, shape in self._shapes(num_kv_heads, dim, hidden_size or dim).items():
                weight = None if shape is None else nn.Parameter(torch.empty(shape))
                self.register_parameter(f"{side}_{name}", weight)
        self.reset_parameters()

    def _shapes(
        self, num_kv_heads: int, dim: int, hidden_size: int
    ) -> dict[str, tuple[int, ...] | None]:
        block = self.compress_block_size
        return {
            "pe": None if self.kind == "mean" else (num_kv_heads, block, dim),
            "w1": {
                "mlp": (hidden_size, block * dim),
                "linear": (dim, block * dim),
                "gated": (dim, dim),
            }.get(self.kind),
            "w2": (dim, hidden_size) if self.kind == "mlp" else None,
        }

    def initial_weights(self) -> dict[str, Tensor]:
        """Fresh values of every parameter, by name, with which phi is exact mean pooling."""
        return {name: self._initial(name, weight) for name, weight in self.named_parameters()}

    def _initial(self, name: str, weight: Tensor) -> Tensor:
        if name.endswith("w1") and self.kind == "mlp":
            return torch.randn_like(weight) / weight.shape[1] ** 0.5
        if name.endswith("w1") and self.kind == "linear":
            identity = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
            return identity.repeat(1, self.compress_block_size) / self.compress_block_size
        return torch.zeros_like(weight)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets ``initial_weights``."""
        for name, value in self.initial_weights().items():
            self.get_parameter(name).copy_(value)

    def weights(self, side: str, dtype: torch.dtype) -> CompressorWeights:
        """Weights for ``side`` "k" or "v" in the tokens' ``dtype``, another one under autocast."""
        found = [getattr(self, f"{side}_{name}") for name in CompressorWeights._fields]
        return CompressorWeights(*[None if x is None else x.to(dtype) for x in found])

    def forward(
        self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compressed keys and values as ``nsa.compress_kv`` lays them out; ``k`` is not rotated."""
        return ops.compress_kv(
            k,
            v,
            self.weights("k", k.dtype),
            self.weights("v", v.dtype),
            kind=self.kind,
            compress_block_size=self.compress_block_size,
            compress_stride=self.compress_stride,
            cu_seqlens=cu_seqlens,
        )

    def extra_repr(self) -> str:
        """Kind and geometry, for ``print(model)``."""
        return (
            f"kind={self.kind!r}, block={self.compress_block_size}, stride={self.compress_stride}"
        )
