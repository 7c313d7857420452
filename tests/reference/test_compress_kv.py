"""Compression against explicit loops; the gradients are checked through the public op as well."""

import pytest
import torch
from tests.cases import DTYPES, HUGE, KINDS, LENGTHS, PACKED, SHAPES, check_compress_kv

from nsa import reference

CASES = [case for case in LENGTHS + SHAPES + PACKED + DTYPES + HUGE if case.offset == 0]


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, x, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.options = options
        return reference.compress_fwd(x, *weights, **options)

    @staticmethod
    def backward(ctx, dout):
        inputs = ctx.saved_tensors
        gradients = reference.compress_bwd(dout, *inputs, **ctx.options)
        pairs = zip(inputs, gradients, strict=True)
        return None, *[None if given is None else gradient for given, gradient in pairs]


def _compress_kv(k, v, phi_k, phi_v, **options):
    return _Compress.apply(options, k, *phi_k), _Compress.apply(options, v, *phi_v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case, kind):
    check_compress_kv(_compress_kv, case, kind)


def test_blocks_start_every_stride_and_end_inside():
    """With l = 4, d = 2 and 9 tokens: blocks 0-3, 2-5, 4-7; the last token is in none."""
    x = torch.arange(9.0).view(1, 9, 1, 1)
    out = reference.compress_fwd(
        x, None, None, None, kind="mean", compress_block_size=4, compress_stride=2
    )
    assert out.flatten().tolist() == [1.5, 3.5, 5.5]


def test_mlp_starts_at_mean_pooling():
    """With W2 = 0 the mlp is the mean, whatever W1 is."""
    x, pe = torch.randn(1, 9, 1, 3), torch.zeros(1, 4, 3)
    w1, w2 = torch.randn(5, 12), torch.zeros(3, 5)
    options = {"compress_block_size": 4, "compress_stride": 2}
    mlp = reference.compress_fwd(x, pe, w1, w2, kind="mlp", **options)
    mean = reference.compress_fwd(x, None, None, None, kind="mean", **options)
    assert torch.equal(mlp, mean)
