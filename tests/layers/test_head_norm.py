"""QK-norm: unit mean square per head, in the precision of its weight."""

from __future__ import annotations

import torch

from nsa.layers.head_norm import head_norm


def test_each_head_has_unit_mean_square():
    x = torch.randn(2, 5, 3, 8) * 40
    assert torch.allclose(head_norm(8, 1e-6)(x).square().mean(-1), torch.ones(2, 5, 3))


def test_narrow_input_is_normalised_in_the_weights_precision():
    x = torch.randn(64, 8).bfloat16()
    found = head_norm(8, 1e-6)(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, head_norm(8, 1e-6)(x.float()).bfloat16())


def test_without_epsilon_it_is_nothing():
    x = torch.randn(3, 8)
    assert head_norm(8, None)(x) is x
