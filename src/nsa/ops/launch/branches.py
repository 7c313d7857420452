"""What a backward pass knows of each branch and of the geometry."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nsa.ops.launch.tiles import LOG2_E, reachable


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Saved tensors of one branch's forward.

    The selected branch without ``block_indices`` reads all blocks.
    """

    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    block_indices: Tensor | None = None

    def contiguous(self) -> Branch:
        """The same with contiguous tensors."""
        indices = None if self.block_indices is None else self.block_indices.contiguous()
        return Branch(
            k=self.k.contiguous(),
            v=self.v.contiguous(),
            o=self.o.contiguous(),
            lse=self.lse.contiguous(),
            block_indices=indices,
        )


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The integers of a backward pass; those of absent branches are never read."""

    compress_block_size: int = 1
    compress_stride: int = 1
    block_size: int = 64
    window_size: int = 1
    softmax_scale: float
    q_offset: int = 0
    cu_seqlens: Tensor | None = None

    def scalars(self) -> dict[str, float]:
        """Kernel arguments: where the queries begin, and the factors of logits and gradients."""
        return {
            "q_offset": self.q_offset,
            "scale_log2": self.softmax_scale * LOG2_E,
            "scale": self.softmax_scale,
        }

    def spans(self, compressed: bool) -> tuple[int, int]:
        """Tokens of a key and between keys: those of compressed blocks, or single tokens."""
        return (self.compress_block_size, self.compress_stride) if compressed else (1, 1)

    def visible(self, branch: Branch, q: Tensor, compressed: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of a branch that some query sees: see ``reachable``."""
        spans = self.spans(compressed)
        return (
            reachable(branch.k, q, self.q_offset, *spans),
            reachable(branch.v, q, self.q_offset, *spans),
        )
