"""Shapes, dtypes and strides that tracing relies on; opcheck holds them against real outputs."""

import pytest
import torch

from nsa.ops.fakes import attention_outputs, gradients_of


@pytest.mark.parametrize(
    ("dtype", "lse_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_attention_outputs(dtype, lse_dtype):
    q = torch.zeros(2, 4, 5, 8, dtype=dtype).transpose(1, 2)
    o, lse = attention_outputs(q, torch.zeros(2, 5, 2, 3, dtype=dtype))
    assert (o.shape, o.dtype, o.is_contiguous()) == ((2, 5, 4, 3), dtype, True)
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 5, 4), lse_dtype, True)


def test_gradients_are_contiguous():
    x, y = torch.zeros(3, 4).T, torch.zeros(2, dtype=torch.float16)
    dx, dy = gradients_of(x, y)
    assert (dx.shape, dx.dtype, dx.is_contiguous()) == ((4, 3), torch.float32, True)
    assert (dy.shape, dy.dtype) == ((2,), torch.float16)
