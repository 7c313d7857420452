"""Rotation: angles, pairing, partial rotation and dtypes."""

from __future__ import annotations

import math

import torch

from nsa.layers import default_frequencies, rotate, rotation


def test_frequencies_are_powers_of_the_base():
    assert torch.allclose(default_frequencies(4, 100.0), torch.tensor([1.0, 0.1]))


def test_rotate_turns_the_pair_of_channels_half_a_head_apart():
    cos, sin = rotation(torch.tensor([0, 3]), torch.tensor([1.0, 0.0]), dtype=torch.float32)
    x = torch.tensor([1.0, 5.0, 0.0, 7.0]).expand(2, 1, 4)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[0], x[0])
    expected = [math.cos(3.0), 5.0, math.sin(3.0), 7.0]
    assert torch.allclose(turned[1, 0], torch.tensor(expected))


def test_scores_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16).double()
    frequencies = default_frequencies(16)

    def score(t: int, s: int) -> float:
        at = [rotation(torch.tensor([p]), frequencies, dtype=torch.float64) for p in (t, s)]
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum().item()

    assert math.isclose(score(9, 4), score(105, 100), rel_tol=1e-5)
    assert not math.isclose(score(9, 4), score(9, 5), rel_tol=1e-2)


def test_channels_past_the_rotary_dim_are_kept():
    cos, sin = rotation(torch.tensor([5]), default_frequencies(4), dtype=torch.float32)
    x = torch.randn(1, 2, 10)
    assert torch.equal(rotate(x, cos, sin)[..., 4:], x[..., 4:])


def test_result_keeps_the_dtype_of_x_and_far_angles_their_precision():
    position = torch.tensor([100_003])
    cos, sin = rotation(position, default_frequencies(8), dtype=torch.float32)
    assert rotate(torch.ones(1, 1, 8, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16
    low, _ = rotation(position, default_frequencies(8), dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), cos, atol=0.01)


def test_attention_scaling_multiplies_both():
    plain = rotation(torch.arange(3), default_frequencies(8), dtype=torch.float32)
    scaled = rotation(
        torch.arange(3), default_frequencies(8), attention_scaling=1.5, dtype=torch.float32
    )
    assert all(torch.equal(a * 1.5, b) for a, b in zip(plain, scaled, strict=True))
