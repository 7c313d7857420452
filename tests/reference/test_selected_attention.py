"""Attention to selected blocks against explicit loops."""

import pytest
import torch
from tests.cases import CASES, check_selected_attention
from tests.reference.differentiable import differentiable

from nsa import reference

OPERATION = differentiable(reference.selected_attention_fwd, reference.selected_attention_bwd)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case):
    check_selected_attention(OPERATION, case)


def _seen(blocks: list[int], t: int) -> list[int]:
    """Tokens that query ``t`` of 12 sees, with blocks of 4."""
    q, k, v = torch.zeros(1, 12, 1, 2), torch.zeros(1, 12, 1, 2), torch.eye(12)[None, :, None]
    indices = torch.tensor(blocks, dtype=torch.int32).expand(1, 12, 1, -1)
    o, _ = reference.selected_attention_fwd(q, k, v, indices, block_size=4, softmax_scale=1.0)
    return o[0, t, 0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("blocks", "t", "expected"),
    [
        pytest.param([0, 2], 9, [0, 1, 2, 3, 8, 9], id="own-block-up-to-the-query"),
        pytest.param([0, 1, 2], 5, [0, 1, 2, 3, 4, 5], id="future-block-is-empty"),
        pytest.param([2, -1, -1], 3, [], id="nothing-but-the-future"),
        pytest.param([-1, -1], 7, [], id="no-blocks"),
        pytest.param([1, 1, 1], 8, [4, 5, 6, 7], id="a-repeated-block-counts-once"),
    ],
)
def test_sees_the_tokens_of_its_blocks(blocks, t, expected):
    assert _seen(blocks, t) == expected
