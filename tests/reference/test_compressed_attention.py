"""Attention to compressed blocks against explicit loops."""

import pytest
import torch
from tests.cases import CASES, SMALL, check_compressed_attention
from tests.reference.differentiable import differentiable

from nsa import reference

OPERATION = differentiable(reference.compressed_attention_fwd, reference.compressed_attention_bwd)
GEOMETRY = {
    "compress_block_size": SMALL.compress_block_size,
    "compress_stride": SMALL.compress_stride,
    "softmax_scale": 1.0,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case):
    check_compressed_attention(OPERATION, case)


def test_a_block_becomes_visible_with_its_last_token():
    """With l = 4, d = 2: block 0 from token 3 on, block 1 from token 5, block 2 from token 7."""
    q, k, v = torch.zeros(1, 9, 1, 2), torch.zeros(1, 3, 1, 2), torch.eye(3)[None, :, None]
    o, lse = reference.compressed_attention_fwd(q, k, v, **GEOMETRY)
    counts = (o[0, :, 0] > 0).sum(-1)
    assert counts.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(lse[0, :, 0], torch.log(counts.float()))


def test_queries_that_see_nothing_have_no_gradient_even_of_lse():
    q, k, v = torch.randn(1, 3, 2, 4), torch.randn(1, 0, 1, 4), torch.randn(1, 0, 1, 4)
    o, lse = reference.compressed_attention_fwd(q, k, v, **GEOMETRY)
    assert torch.equal(o, torch.zeros_like(o))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    grads = reference.compressed_attention_bwd(
        torch.ones_like(o), torch.ones_like(lse), q, k, v, o, lse, **GEOMETRY
    )
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_gradient_of_lse_is_optional():
    q, k, v = torch.randn(1, 9, 2, 4), torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4)
    o, lse = reference.compressed_attention_fwd(q, k, v, **GEOMETRY)
    saved = (q, k, v, o, lse)
    without = reference.compressed_attention_bwd(o, None, *saved, **GEOMETRY)
    zero = reference.compressed_attention_bwd(o, torch.zeros_like(lse), *saved, **GEOMETRY)
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))
