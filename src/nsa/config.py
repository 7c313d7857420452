"""Geometry of Native Sparse Attention: the integers every operation agrees on.

Symbols are those of arXiv 2502.11089, section 3. Standard library only, so that a config can be
read, checked and stored without loading PyTorch. Widths, heads and the kind of compressor belong to
the model, not here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class NSAConfig:
    """Block sizes and counts of the three branches, all in tokens or blocks.

    Args:
        compress_block_size: tokens per compressed block (the paper's l).
        compress_stride: tokens between the starts of neighbouring compressed blocks (d).
        block_size: tokens per selection block (l').
        num_selected_blocks: blocks each query reads, the forced ones included (n).
        num_init_blocks: blocks at the start of the sequence that every query reads.
        num_local_blocks: most recent blocks that every query reads, its own block first.
        window_size: keys the window branch sees, the query's own token included (w).

    Raises:
        ValueError: a value is not a positive integer (zero is allowed for the two forced counts),
            or the values do not fit together. Eq. 9 needs l <= l', d | l and d | l'.

    Example:
        >>> NSAConfig(window_size=256).num_compressed(100)
        5
    """

    compress_block_size: int = 32
    compress_stride: int = 16
    block_size: int = 64
    num_selected_blocks: int = 16
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(
                    f"{field.name}: expected an int, got {value!r} ({type(value).__name__})."
                )
            least = 0 if field.name in ("num_init_blocks", "num_local_blocks") else 1
            if value < least:
                raise ValueError(f"{field.name}: expected at least {least}, got {value}.")
        if self.compress_block_size > self.block_size:
            raise ValueError(
                f"compress_block_size: expected at most block_size = {self.block_size} (eq. 9), "
                f"got {self.compress_block_size}. Raise block_size or compress shorter blocks."
            )
        for name in ("compress_block_size", "block_size"):
            if getattr(self, name) % self.compress_stride:
                raise ValueError(
                    f"{name}: expected a multiple of compress_stride = {self.compress_stride} "
                    f"(eq. 9), got {getattr(self, name)}. Choose a stride that divides it."
                )
        forced = self.num_init_blocks + self.num_local_blocks
        if self.num_selected_blocks < forced:
            raise ValueError(
                "num_selected_blocks: expected at least num_init_blocks + num_local_blocks = "
                f"{forced}, since forced blocks are counted in it, got {self.num_selected_blocks}."
            )

    @classmethod
    def paper(cls) -> NSAConfig:
        """The paper's 27B model (section 4.1): 32/16/64, 16 blocks (1 initial, 2 local), 512."""
        return cls()

    @classmethod
    def tiny(cls) -> NSAConfig:
        """For models of a few million parameters and sequences of about a thousand tokens."""
        return cls(
            compress_block_size=16,
            compress_stride=8,
            block_size=16,
            num_selected_blocks=8,
            window_size=64,
        )

    def num_compressed(self, num_tokens: int) -> int:
        """Compressed blocks that fit in ``num_tokens`` tokens (eq. 7): 0 below one block."""
        if num_tokens < self.compress_block_size:
            return 0
        return (num_tokens - self.compress_block_size) // self.compress_stride + 1

    def num_blocks(self, num_tokens: int) -> int:
        """Selection blocks that cover ``num_tokens`` tokens, the last one possibly short."""
        return -(-num_tokens // self.block_size)

    def importance_weights(self) -> tuple[int, ...]:
        """Weights that turn compressed scores into block scores (eq. 9, 0-based).

        Entry ``i`` is the weight of compressed block ``(l'/d) j + i - (l/d - 1)`` for selection
        block ``j``: how many stride-long pieces of block ``j`` that compressed block covers. The
        paper's 32/16/64 gives (1, 2, 2, 2, 1).
        """
        per_block = self.block_size // self.compress_stride
        per_window = self.compress_block_size // self.compress_stride
        weights = [0] * (per_block + per_window - 1)
        for m in range(per_block):
            for r in range(per_window):
                weights[m - r + per_window - 1] += 1
        return tuple(weights)
