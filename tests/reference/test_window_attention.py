"""Sliding-window attention against explicit loops."""

import pytest
import torch
from tests.cases import CASES, check_window_attention
from tests.reference.differentiable import differentiable

from nsa import reference

OPERATION = differentiable(reference.window_attention_fwd, reference.window_attention_bwd)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case):
    check_window_attention(OPERATION, case)


@pytest.mark.parametrize("window_size", [1, 2, 5, 9, 100])
def test_sees_exactly_the_last_w_tokens(window_size):
    q, k, v = torch.zeros(1, 9, 1, 2), torch.zeros(1, 9, 1, 2), torch.eye(9)[None, :, None]
    o, _ = reference.window_attention_fwd(q, k, v, window_size=window_size, softmax_scale=1.0)
    for t, row in enumerate(o[0, :, 0]):
        seen = row.nonzero()[:, 0].tolist()
        assert seen == list(range(max(0, t - window_size + 1), t + 1))
