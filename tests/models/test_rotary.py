"""The model's rotary embedding against transformers' own, for every scaling type."""

from __future__ import annotations

import pytest
import torch
from tests.models.small import random_ids, small_config, small_model
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nsa.models.rotary import RotaryEmbedding, max_positions

SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    },
}


def scaled_config(rope_type: str, **changes):
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, **SCALINGS[rope_type]}
    return small_config(rope_parameters=rope, **changes)


@pytest.mark.parametrize("rope_type", SCALINGS)
@pytest.mark.parametrize("length", [50, 500, 900])
def test_angles_are_those_of_transformers(rope_type, length):
    config = scaled_config(rope_type)
    positions = torch.arange(length)[None]
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours = RotaryEmbedding(config)(positions, seq_len=length, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_yarn_sharpens_logits():
    rotary = RotaryEmbedding(scaled_config("yarn"))
    cos, _ = rotary(torch.zeros(1, 1, dtype=torch.int64), seq_len=1, dtype=torch.float32)
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
    cos, _ = RotaryEmbedding(config)(torch.arange(3)[None], seq_len=3, dtype=torch.float32)
    assert cos.shape == (1, 3, 4)


def test_dynamic_scaling_extends_the_limit():
    assert max_positions(scaled_config("dynamic")) == 4 * 512
    assert max_positions(scaled_config("yarn")) == 512


@pytest.mark.parametrize("rope_type", ["yarn", "llama3", "linear", "longrope"])
def test_scaling_reaches_every_branch_and_the_cache(rope_type):
    rope = scaled_config(rope_type).rope_parameters
    model = small_model(dtype=torch.float64, rope_parameters=rope)
    ids = random_ids(1, 100)
    with torch.no_grad():
        plain = small_model(dtype=torch.float64)(ids).logits
        whole = model(ids).logits
        cache = model(ids[:, :70], use_cache=True).past_key_values
        rest = model(ids[:, 70:], past_key_values=cache).logits
    assert not torch.allclose(plain, whole, atol=1e-3)
    assert torch.allclose(rest, whole[:, 70:])


def test_unknown_type():
    config = small_config()
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(
        ValueError, match=r"rope_type: expected one of default, linear.*got 'spiral'"
    ):
        RotaryEmbedding(config)
