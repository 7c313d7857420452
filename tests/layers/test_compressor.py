"""The compressor's weights: mean pooling at the start, gradients, autocast."""

from __future__ import annotations

import pytest
import torch

from nsa.layers import Compressor
from nsa.ops.compress_kv import KINDS

BLOCK, STRIDE = 8, 4


def compressor(kind: str, **kwargs) -> Compressor:
    return Compressor(kind, 2, 6, 4, BLOCK, STRIDE, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_exact_mean_pooling(kind):
    torch.manual_seed(0)
    k, v = torch.randn(1, 21, 2, 6), torch.randn(1, 21, 2, 4)
    found = compressor(kind)(k, v)
    for x, out in zip((k, v), found, strict=True):
        windows = x.unfold(1, BLOCK, STRIDE).mean(-1)
        assert out.shape == windows.shape
        assert torch.allclose(out, windows, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "linear", "gated"])
def test_every_weight_learns(kind):
    torch.manual_seed(0)
    module = compressor(kind)
    with torch.no_grad():  # away from the start, where some gradients are zero by design
        for weight in module.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    k, v = module(torch.randn(1, 21, 2, 6), torch.randn(1, 21, 2, 4))
    (k.square().sum() + v.square().sum()).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in module.parameters())


def test_hidden_size_is_that_of_the_mlp():
    assert compressor("mlp", hidden_size=5).k_w1.shape == (5, BLOCK * 6)
    assert compressor("mlp").v_w1.shape == (4, BLOCK * 4)


def test_weights_follow_the_tokens_dtype_under_autocast():
    k, v = compressor("mlp")(torch.randn(1, 9, 2, 6).bfloat16(), torch.randn(1, 9, 2, 4).bfloat16())
    assert (k.dtype, v.dtype) == (torch.bfloat16, torch.bfloat16)


def test_kind_and_geometry_are_printed():
    assert "kind='gated', block=8, stride=4" in repr(compressor("gated"))


def test_unknown_kind():
    with pytest.raises(ValueError, match="compressor: expected one of mlp, linear, gated, mean, g"):
        compressor("max")


def test_hidden_size_of_a_kind_without_hidden_units():
    with pytest.raises(ValueError, match=r"hidden_size: expected None.*'mean'.*got 7"):
        compressor("mean", hidden_size=7)
