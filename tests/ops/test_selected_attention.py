"""The public op: values, gradients, and what PyTorch asks of it."""

import pytest
import torch
from tests.cases import FEW, check_selected_attention, random_blocks
from tests.ops import contract

from nsa.ops import selected_attention
from nsa.ops.selected_attention import selected_attention_bwd, selected_attention_fwd

NAMES = ("q", "k_slc", "v_slc")


def _tensors(case):
    return {name: case.tensors()[name].to(case.dtype) for name in NAMES}


def _function(case):
    blocks = random_blocks(case)

    def function(*tensors):
        return selected_attention(
            *tensors, blocks, block_size=case.config.block_size, **case.where()
        )

    return function


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_equals_the_oracle(case):
    check_selected_attention(selected_attention, case)


@pytest.mark.parametrize("layout", contract.LAYOUTS)
@pytest.mark.parametrize("case", contract.CASES, ids=lambda case: case.name)
def test_contract(case, layout):
    tensors = [contract.LAYOUTS[layout](x) for x in _tensors(case).values()]
    tensors.append(random_blocks(case))
    constants = (case.cu_seqlens(), case.config.block_size, 0.7, case.offset, "reference")
    contract.check_forward(selected_attention_fwd, *tensors, *constants)
    o, lse = selected_attention_fwd(*tensors, *constants)
    dlse = torch.randn_like(lse)
    contract.check_backward(
        selected_attention_bwd, torch.randn_like(o), dlse, *tensors, o, lse, *constants
    )


@pytest.mark.parametrize("case", contract.GRADCHECK, ids=lambda case: case.name)
def test_gradients(case):
    contract.check_gradients(_function(case), *_tensors(case).values())


def test_gradient_of_lse():
    case = contract.SEEING
    blocks = torch.zeros(1, case.lengths[0], case.kv_heads, 1, dtype=torch.int32)
    constants = (blocks, None, case.config.block_size, 0.7, case.offset, "reference")
    contract.check_gradients(
        lambda *tensors: selected_attention_fwd(*tensors, *constants), *_tensors(case).values()
    )


@pytest.mark.parametrize("case", contract.CASES, ids=lambda case: case.name)
def test_compiles_to_one_graph(case):
    contract.check_compiled(_function(case), _tensors(case))


@pytest.mark.parametrize("block_size", [0, -1, 2.0, True], ids=str)
def test_block_size_is_a_positive_integer(block_size):
    q, blocks = torch.randn(1, 3, 1, 4), torch.zeros(1, 3, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^block_size: expected a positive integer, got"):
        selected_attention(q, q, q, blocks, block_size=block_size)


def test_checks_the_block_indices():
    q = torch.randn(1, 3, 1, 4)
    with pytest.raises(ValueError, match=r"^block_indices: expected int32 \[1, 3, 1\] \+ \[n\]"):
        selected_attention(q, q, q, torch.zeros(1, 3, 1, 1).long(), block_size=4)
