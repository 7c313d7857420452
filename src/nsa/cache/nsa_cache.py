"""The caches of all layers of a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from nsa.cache.layer_cache import LayerCache
from nsa.config import NSAConfig


class NSACache:
    """One ``LayerCache`` per layer, changed together.

    Args:
        num_layers: layers of the model.
        config: geometry of the blocks.

    Example:
        >>> cache = NSACache(2, NSAConfig.tiny())
        >>> len(cache), cache.seq_lens
        (2, [])
    """

    def __init__(self, num_layers: int, config: NSAConfig):
        self.layers = [LayerCache(config) for _ in range(num_layers)]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)

    @property
    def seq_lens(self) -> list[int]:
        """Tokens of each row, as the first layer holds them."""
        return self.layers[0].seq_lens if self.layers else []

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(layer.num_bytes for layer in self.layers)

    def crop(self, num_tokens: int) -> None:
        """Drops the last ``num_tokens`` tokens of every row."""
        for layer in self.layers:
            layer.crop(num_tokens)

    def reorder(self, rows: Tensor) -> None:
        """Row ``i`` becomes the old row ``rows[i]`` (beam search)."""
        for layer in self.layers:
            layer.reorder(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times, copies side by side."""
        for layer in self.layers:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows ``indices``."""
        for layer in self.layers:
            layer.batch_select_indices(indices)

    def reset(self) -> None:
        """Forgets every row, and frees the memory."""
        for layer in self.layers:
            layer.reset()
