"""``nsa.cache.LayerCache`` behind the interface that ``generate`` expects of a cache layer."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from nsa.cache import LayerCache
from nsa.config import NSAConfig


class NSACacheLayer(CacheLayerMixin):
    """One layer of a ``transformers.DynamicCache(config=model.config)``.

    transformers counts columns of the padded batch; ``storage`` counts the real tokens of each row.
    """

    _layer_type = "nsa_attention"
    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.storage: LayerCache | None = None
        self.num_columns = 0

    def open(self, config: NSAConfig) -> LayerCache:
        """The storage, made on first use: transformers creates layers without a config."""
        if self.storage is None:
            self.storage = LayerCache(config)
            self.is_initialized = True
        return self.storage

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: ``open`` does it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> NoReturn:
        """Not how this layer is filled: three branches need more than one pair of tensors."""
        raise RuntimeError("NSACacheLayer is filled by the attention module, not by update().")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns after the next ``query_length`` tokens, and the first column."""
        return self.num_columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns, padding included."""
        return self.num_columns

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Removes ``-tokens_to_remove`` columns, or, if positive, all columns past that one."""
        drop = (
            self.num_columns - tokens_to_remove if tokens_to_remove > 0 else abs(tokens_to_remove)
        )
        drop = min(max(drop, 0), self.num_columns)
        self.num_columns -= drop
        if self.storage is not None:
            self.storage.crop(drop)

    def reset(self) -> None:
        """Forgets everything."""
        self.num_columns = 0
        if self.storage is not None:
            self.storage.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search."""
        if self.storage is not None:
            self.storage.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats rows."""
        if self.storage is not None:
            self.storage.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps rows."""
        if self.storage is not None:
            self.storage.batch_select_indices(indices)

    def offload(self) -> NoReturn:
        """Not supported."""
        raise NotImplementedError("Offloading the cache of a sparse model is not supported.")


def nsa_layers(past_key_values: Cache, num_layers: int) -> list[NSACacheLayer]:
    """The cache's layers; an empty ``DynamicCache()`` is given its layers here.

    Raises:
        ValueError: the cache was made for another kind of attention, or offloads.
    """
    if getattr(past_key_values, "offloading", False):
        raise ValueError(
            "past_key_values: expected a cache that stays on its device, got one that offloads. "
            "Use cache_implementation=None."
        )
    layers = past_key_values.layers
    if not layers:
        layers.extend(NSACacheLayer() for _ in range(num_layers))
    found = [layer for layer in layers if isinstance(layer, NSACacheLayer)]
    if len(found) != num_layers or len(layers) != num_layers:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        raise ValueError(
            f"past_key_values: expected {num_layers} layers of NSACacheLayer, got {len(layers)} of "
            f"{kinds}. Make it with transformers.DynamicCache(config=model.config)."
        )
    return found
