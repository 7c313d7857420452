"""The model's rotary embedding against transformers' own, for every scaling type."""

from __future__ import annotations

import pytest
import torch
from tests.models.small import left_padded, random_ids, small_config, small_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nsa.models.rotary import RotaryEmbedding

SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "proportional": {"partial_rotary_factor": 0.5},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
# Their frequencies follow the length of the text.
REFUSED = {
    "dynamic": {"factor": 4.0},
    "longrope": {"factor": 8.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
}


def rope(rope_type: str) -> dict:
    return {"rope_type": rope_type, "rope_theta": 10_000.0, **SCALINGS[rope_type]}


def scaled_config(rope_type: str):
    return small_config(rope_parameters=rope(rope_type))


def test_every_type_of_transformers_is_tested_or_refused():
    assert {*SCALINGS, *REFUSED} == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("rope_type", SCALINGS)
@pytest.mark.parametrize("length", [50, 500, 900])
def test_angles_are_those_of_transformers(rope_type, length):
    config = scaled_config(rope_type)
    positions = torch.arange(length)[None]
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = RotaryEmbedding(config)(positions, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_yarn_sharpens_logits():
    rotary = RotaryEmbedding(scaled_config("yarn"))
    cos, _ = rotary(torch.zeros(1, 1, dtype=torch.int64), dtype=torch.float32)
    assert torch.allclose(cos, 1.0 + 0.1 * torch.tensor(8.0).log())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_frequencies_keep_float32(dtype):
    rotary = RotaryEmbedding(scaled_config("yarn"))
    expected = rotary.inv_freq.clone()
    rotary.to(dtype)
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, expected)


def test_partial_rotation():
    config = small_config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    cos, _ = RotaryEmbedding(config)(torch.arange(3)[None], dtype=torch.float32)
    assert cos.shape == (1, 3, 4)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
@pytest.mark.parametrize("rope_type", SCALINGS)
def test_a_text_is_rotated_alike_alone_padded_packed_and_cached(rope_type, attention):
    """Lengths on both sides of what the scalings take for the original length, 64 tokens."""
    model = small_model(dtype=torch.float64, attention=attention, rope_parameters=rope(rope_type))
    rows = [random_ids(n, seed=n) for n in (100, 40)]
    with torch.no_grad():
        alone = [model(row[None], use_cache=False).logits[0] for row in rows]
        ids, mask = left_padded(rows)
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        bounds = torch.tensor([0, 100, 140]).int()
        packed = model(torch.cat(rows)[None], cu_seqlens=bounds).logits[0]
        first = model(rows[0][None, :50], use_cache=True)
        rest = model(rows[0][None, 50:], past_key_values=first.past_key_values).logits
    for row, expected in enumerate(alone):
        assert torch.allclose(padded[row, mask[row].bool()], expected)
    assert torch.allclose(packed, torch.cat(alone))
    assert torch.allclose(torch.cat((first.logits, rest), dim=1)[0], alone[0])


@pytest.mark.parametrize("rope_type", [name for name in SCALINGS if name != "default"])
def test_scaling_reaches_the_model(rope_type):
    ids = random_ids(1, 100)
    with torch.no_grad():
        plain = small_model()(ids).logits
        scaled = small_model(rope_parameters=rope(rope_type))(ids).logits
    assert not torch.allclose(plain, scaled, atol=1e-3)


@pytest.mark.parametrize(("rope_type", "values"), REFUSED.items(), ids=REFUSED)
def test_frequencies_that_follow_the_length_are_refused(rope_type, values):
    with pytest.raises(
        ValueError,
        match=rf"rope_type: expected one of default, linear.* any length, got '{rope_type}'.*yarn",
    ):
        small_config(rope_parameters={"rope_type": rope_type, **values})
