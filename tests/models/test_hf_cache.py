"""The cache layer that ``generate`` sees."""

from __future__ import annotations

import pytest
import torch
from tests.models.small import left_padded, random_ids, small_config, small_model
from transformers import DynamicCache, StaticCache

from nsa.models.hf_cache import NSACacheLayer, nsa_layers


def prefilled(columns: int = 20):
    model = small_model()
    ids, mask = left_padded([random_ids(columns), random_ids(columns - 6)])
    with torch.no_grad():
        return model, model(ids, attention_mask=mask, use_cache=True).past_key_values


def test_transformers_makes_our_layers_from_the_config():
    cache = DynamicCache(config=small_config())
    assert [type(layer) for layer in cache.layers] == [NSACacheLayer] * 2


def test_columns_count_padding_and_rows_do_not():
    _, cache = prefilled(20)
    assert cache.get_seq_length() == 20
    assert cache.get_mask_sizes(3, 0) == (23, 0)
    assert cache.layers[0].get_max_length() == -1
    assert cache.layers[1].storage.seq_lens == [20, 14]
    assert cache.is_croppable
    assert not cache.is_compileable


@pytest.mark.parametrize(
    ("argument", "columns"), [(-3, 17), (0, 20), (12, 12), (25, 20), (-99, 0)], ids=str
)
def test_crop_takes_both_signs(argument, columns):
    _, cache = prefilled(20)
    for layer in cache.layers:
        layer.crop(argument)
    assert cache.get_seq_length() == columns
    assert cache.layers[0].storage.seq_lens == [columns, max(0, columns - 6)]


def test_rows_and_reset():
    _, cache = prefilled(20)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.layers[0].storage.seq_lens == [14, 20]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert cache.layers[1].storage.seq_lens == [14, 20]
    cache.reset()
    assert cache.get_seq_length() == 0


def test_an_unused_layer_can_be_changed():
    layer = NSACacheLayer()
    layer.crop(-1)
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    layer.reset()
    assert layer.get_seq_length() == 0


def test_update_is_not_the_way_in():
    with pytest.raises(RuntimeError, match="filled by the attention module"):
        NSACacheLayer().update(torch.zeros(1), torch.zeros(1))


def test_an_empty_cache_without_config_is_filled():
    model, cache = small_model(), DynamicCache()
    with torch.no_grad():
        model(random_ids(1, 9), past_key_values=cache)
    assert cache.get_seq_length() == 9


def test_a_dense_models_cache():
    cache = DynamicCache(config=small_config(attention="dense"))
    with pytest.raises(ValueError, match="expected 2 layers of NSACacheLayer, got 2 of DynamicLa"):
        nsa_layers(cache, 2)


def test_an_offloading_cache():
    cache = DynamicCache(config=small_config())
    cache.offloading = True
    with pytest.raises(ValueError, match="expected a cache that stays on its device"):
        nsa_layers(cache, 2)
    with pytest.raises(NotImplementedError, match="Offloading the cache"):
        cache.layers[0].offload()


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_what_does_not_grow(attention):
    model, ids = small_model(attention=attention), random_ids(1, 9)
    dense = small_config(attention="dense")  # transformers knows no static layer for ours
    with pytest.raises(ValueError, match=r"past_key_values: expected a DynamicCache.*StaticCache"):
        model(ids, past_key_values=StaticCache(config=dense, max_cache_len=20))
    with pytest.raises(ValueError, match=r"past_key_values: expected a DynamicCache.*a tuple"):
        model(ids, past_key_values=())
    with pytest.raises(ValueError, match=r"got (a StaticCache|'static')"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
