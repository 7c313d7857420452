"""The caches of all layers change together."""

from __future__ import annotations

import torch

from nsa import NSACache, NSAConfig
from nsa.cache import TokenKV


def filled() -> NSACache:
    cache = NSACache(2, NSAConfig.tiny())
    for layer in cache:
        tokens = torch.arange(2.0)[:, None, None, None].expand(2, 20, 1, 4)
        layer.append(TokenKV(*[tokens] * 6), lambda k, v, first: (k[:, ::8], v[:, ::8]))
    return cache


def test_it_is_a_list_of_layers():
    cache = filled()
    assert len(cache) == 2
    assert cache[1].seq_lens == [20, 20] == cache.seq_lens
    assert cache.num_bytes == 2 * cache[0].num_bytes


def test_every_layer_changes():
    cache = filled()
    cache.crop(3)
    assert [layer.seq_lens for layer in cache] == [[17, 17]] * 2
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    cache.reorder(torch.tensor([2, 0, 1]))
    for layer in cache:
        assert layer.tensors().k_win[:, 0, 0, 0].tolist() == [1.0, 0.0, 0.0]
    cache.reset()
    assert cache.num_bytes == 0


def test_no_layers():
    assert NSACache(0, NSAConfig.tiny()).seq_lens == []
