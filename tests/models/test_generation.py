"""``generate``: cache against no cache, padding, beams, sampling, assistance, chunks."""

from __future__ import annotations

import pytest
import torch
from tests.models.small import left_padded, random_ids, small_model
from transformers import DynamicCache

GREEDY = {"do_sample": False, "use_cache": True, "eos_token_id": None}
KINDS = pytest.mark.parametrize("attention", ["nsa", "dense"])


@pytest.mark.parametrize("kv_per_branch", [True, False], ids=["own-kv", "shared-kv"])
@pytest.mark.parametrize("compressor", ["mlp", "gated"])
def test_cached_decode_is_the_uncached_forward_at_each_of_300_steps(kv_per_branch, compressor):
    model = small_model(
        dtype=torch.float64, kv_per_branch=kv_per_branch, compressor=compressor, num_hidden_layers=1
    )
    ids = random_ids(2, 305)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        found = [model(ids[:, :5], past_key_values=cache).logits]
        for step in range(5, 305):
            found.append(model(ids[:, step : step + 1], past_key_values=cache).logits)
            if step % 50 == 0:  # the forward that a decoder without cache would make
                alone = model(ids[:, : step + 1], use_cache=False).logits[:, -1:]
                assert torch.allclose(found[-1], alone, rtol=0, atol=1e-11)
    assert len(found) == 301
    error = (torch.cat(found, dim=1) - whole).abs().amax((0, 2))
    assert error.max() < 1e-11, f"worst at position {int(error.argmax())}"


@KINDS
def test_greedy_with_and_without_a_cache(attention):
    model, ids = small_model(attention=attention), random_ids(2, 30)
    cached = model.generate(ids, max_new_tokens=60, **GREEDY)
    plain = model.generate(ids, max_new_tokens=60, **{**GREEDY, "use_cache": False})
    assert cached.shape == (2, 90)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@KINDS
def test_a_left_padded_batch_gives_the_text_of_single_prompts(attention, use_cache):
    model = small_model(attention=attention, dtype=torch.float64)
    rows = [random_ids(n, seed=n) for n in (45, 30, 1)]
    ids, mask = left_padded(rows)
    options = {"max_new_tokens": 25, **GREEDY, "use_cache": use_cache}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, tokens in enumerate(rows):
        alone = model.generate(tokens[None], **options)
        assert torch.equal(together[row, ids.shape[1] :], alone[0, len(tokens) :])


@KINDS
def test_beams_with_and_without_a_cache(attention):
    model = small_model(attention=attention, dtype=torch.float64)
    ids, mask = left_padded([random_ids(25), random_ids(12)])
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 30, **GREEDY}
    options |= {"num_return_sequences": 2}
    cached = model.generate(ids, **options)
    assert cached.shape == (4, 55)
    assert torch.equal(cached, model.generate(ids, **{**options, "use_cache": False}))


def test_embeddings_as_the_prompt():
    model, ids = small_model(), random_ids(1, 20)
    embeds = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeds, max_new_tokens=15, **GREEDY)
    assert torch.equal(found, model.generate(ids, max_new_tokens=15, **GREEDY)[:, 20:])


def test_sampling_is_reproducible_and_varied():
    model, ids = small_model(), random_ids(1, 20)
    options = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.5}
    options |= {"max_new_tokens": 25, "num_return_sequences": 3}
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(model.generate(ids, **options))
    assert torch.equal(*texts)
    assert len({tuple(row) for row in texts[0].tolist()}) == 3


@pytest.mark.parametrize("size", [1, 7, 16])
@KINDS
def test_chunked_prefill(attention, size):
    model = small_model(attention=attention, dtype=torch.float64)
    ids, mask = left_padded([random_ids(40), random_ids(11)])
    options = {"attention_mask": mask, "max_new_tokens": 20, **GREEDY}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=size, **options), expected)


@KINDS
def test_an_empty_prompt(attention):
    ids, mask = random_ids(2, 9), torch.tensor([[1] * 9, [0] * 9])
    with pytest.raises(ValueError, match="attention_mask: expected a real token in each row"):
        small_model(attention=attention).generate(ids, attention_mask=mask, max_new_tokens=2)


@KINDS
def test_prompt_lookup_rolls_the_cache_back(attention):
    model = small_model(attention=attention, dtype=torch.float64)
    ids = random_ids(1, 8).repeat(1, 5)  # repeats, so that there is something to look up
    expected = model.generate(ids, max_new_tokens=50, **GREEDY)
    found = model.generate(ids, max_new_tokens=50, prompt_lookup_num_tokens=6, **GREEDY)
    assert torch.equal(found, expected)


def test_assisted_generation():
    model = small_model(dtype=torch.float64)
    assistant = small_model(dtype=torch.float64, window_size=6, num_hidden_layers=1)
    ids = random_ids(1, 30)
    expected = model.generate(ids, max_new_tokens=40, **GREEDY)
    found = model.generate(ids, max_new_tokens=40, assistant_model=assistant, **GREEDY)
    assert torch.equal(found, expected)


def test_a_conversation_goes_on_in_the_same_cache():
    model, ids = small_model(dtype=torch.float64), random_ids(1, 60)
    cache = DynamicCache(config=model.config)
    first = model.generate(ids[:, :30], past_key_values=cache, max_new_tokens=10, **GREEDY)
    again = torch.cat((first, ids[:, 30:]), dim=1)
    found = model.generate(again, past_key_values=cache, max_new_tokens=10, **GREEDY)
    assert torch.equal(found, model.generate(again, max_new_tokens=10, **GREEDY))


def test_a_cropped_cache_is_as_if_it_had_never_been_longer():
    model, ids = small_model(dtype=torch.float64), random_ids(1, 90)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for kept in (61, 40, 33, 7):
            cache = model(random_ids(1, 80, seed=9), use_cache=True).past_key_values
            cache.crop(-80)
            model(ids[:, :70], past_key_values=cache)
            cache.crop(-(70 - kept))
            rest = model(ids[:, kept:], past_key_values=cache).logits
            assert torch.allclose(rest, whole[:, kept:])


def test_generation_stops_at_the_last_position_with_an_error():
    model = small_model()
    with pytest.raises(ValueError, match="expected sequences of at most 512 tokens"):
        model.generate(random_ids(1, 510), max_new_tokens=10, **GREEDY)


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_other_caches_are_refused(kind):
    with pytest.raises(ValueError, match=f"cache_implementation: expected None.*got '{kind}'"):
        small_model().generate(random_ids(1, 5), max_new_tokens=2, cache_implementation=kind)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_continuous_batching_is_refused(attention):
    model = small_model(attention=attention)
    with pytest.raises(NotImplementedError, match=r"generate_batch: .* not supported\. Call gen"):
        model.generate_batch([[1, 2, 3]])


def test_another_models_cache_is_refused():
    dense = small_model(attention="dense")
    cache = dense(random_ids(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: expected 2 layers of NSACacheLayer"):
        small_model()(random_ids(1, 1), past_key_values=cache)
