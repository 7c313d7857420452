"""The public op: values, gradients, and what PyTorch asks of it."""

import pytest
import torch
from tests.cases import FEW, check_window_attention
from tests.ops import contract

from nsa.ops import window_attention
from nsa.ops.window_attention import window_attention_bwd, window_attention_fwd

NAMES = ("q", "k_win", "v_win")


def _tensors(case):
    return {name: case.tensors()[name].to(case.dtype) for name in NAMES}


def _options(case):
    return {"window_size": case.config.window_size, **case.where()}


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_equals_the_oracle(case):
    check_window_attention(window_attention, case)


@pytest.mark.parametrize("layout", contract.LAYOUTS)
@pytest.mark.parametrize("case", contract.CASES, ids=lambda case: case.name)
def test_contract(case, layout):
    tensors = [contract.LAYOUTS[layout](x) for x in _tensors(case).values()]
    constants = (case.cu_seqlens(), case.config.window_size, 0.7, case.offset, "reference")
    contract.check_forward(window_attention_fwd, *tensors, *constants)
    o, lse = window_attention_fwd(*tensors, *constants)
    contract.check_backward(
        window_attention_bwd, torch.randn_like(o), lse.sin(), *tensors, o, lse, *constants
    )


@pytest.mark.parametrize("case", contract.GRADCHECK, ids=lambda case: case.name)
def test_gradients(case):
    contract.check_gradients(
        lambda *tensors: window_attention(*tensors, **_options(case)), *_tensors(case).values()
    )


@pytest.mark.parametrize("case", contract.CASES, ids=lambda case: case.name)
def test_compiles_to_one_graph(case):
    contract.check_compiled(
        lambda *tensors: window_attention(*tensors, **_options(case)), _tensors(case)
    )


def test_gradient_of_lse():
    """The op under the public function returns lse, whose gradient other code may use."""
    case = contract.SEEING
    constants = (None, case.config.window_size, 0.7, case.offset, "reference")
    contract.check_gradients(
        lambda *tensors: window_attention_fwd(*tensors, *constants), *_tensors(case).values()
    )


def test_default_scale_is_one_over_root_dim():
    q, k, v = torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
    default = window_attention(q, k, v, window_size=4)
    assert torch.equal(default, window_attention(q, k, v, window_size=4, softmax_scale=0.25))


@pytest.mark.parametrize("window_size", [0, -1, 2.0, True], ids=str)
def test_window_size_is_a_positive_integer(window_size):
    q = torch.randn(1, 3, 1, 4)
    with pytest.raises(ValueError, match=r"^window_size: expected a positive integer, got"):
        window_attention(q, q, q, window_size=window_size)
