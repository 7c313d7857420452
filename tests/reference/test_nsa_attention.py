"""The whole of eq. 5 against explicit loops, and the gated sum alone."""

import pytest
import torch
from tests import oracle
from tests.cases import CASES, NSA_INPUTS, oracle_blocks
from tests.tolerance import assert_close_to_oracle

from nsa import reference


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case):
    tensors = [case.tensors()[name] for name in NSA_INPUTS]
    blocks = oracle_blocks(case)

    def one(*pieces):
        return oracle.nsa_attention(
            *pieces, config=case.config, scale=case.scale(), offset=case.offset
        )

    narrow = [x.to(case.dtype) for x in tensors]
    out = reference.nsa_attention_fwd(*narrow, config=case.config, **case.where())[0]
    assert out.dtype == case.dtype
    assert_close_to_oracle(
        out,
        case.per_sequence(one, *tensors, blocks, slots=(1, 2)),
        case.per_sequence(one, *narrow, blocks, slots=(1, 2)),
    )


def test_combine_is_a_plain_weighted_sum():
    """In the order cmp, slc, win; gates need not sum to 1."""
    branches = [torch.full((1, 2, 1, 3), value) for value in (1.0, 10.0, 100.0)]
    gates = torch.tensor([[[[1.0, 2.0, 3.0]], [[0.0, -1.0, 0.5]]]])
    out = reference.combine(*branches, gates)
    assert out[0, :, 0].tolist() == [[321.0] * 3, [40.0] * 3]


def test_combine_adds_in_float32():
    """256 + 1 is not representable in bfloat16, but 256 + 1 + 1 is."""
    branches = [torch.full((1, 1, 1, 1), value).bfloat16() for value in (256.0, 1.0, 1.0)]
    out = reference.combine(*branches, torch.ones(1, 1, 1, 3).bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.item() == 258
