"""The public op: values, gradients, and what PyTorch asks of it."""

import pytest
import torch
from tests.cases import FEW, check_compressed_attention
from tests.ops import contract

from nsa.ops import compressed_attention
from nsa.ops.compressed_attention import compressed_attention_bwd, compressed_attention_fwd

NAMES = ("q", "k_cmp", "v_cmp")


def _tensors(case):
    return {name: case.tensors()[name].to(case.dtype) for name in NAMES}


def _options(case):
    return {
        "compress_block_size": case.config.compress_block_size,
        "compress_stride": case.config.compress_stride,
        **case.where(),
    }


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_equals_the_oracle(case):
    check_compressed_attention(compressed_attention, case)


@pytest.mark.parametrize("layout", contract.LAYOUTS)
@pytest.mark.parametrize("case", contract.CASES, ids=lambda case: case.name)
def test_contract(case, layout):
    tensors = [contract.LAYOUTS[layout](x) for x in _tensors(case).values()]
    sizes = (case.config.compress_block_size, case.config.compress_stride)
    constants = (case.cu_seqlens(), *sizes, 0.7, case.offset, "reference")
    contract.check_forward(compressed_attention_fwd, *tensors, *constants)
    o, lse = compressed_attention_fwd(*tensors, *constants)
    dlse = torch.randn_like(lse)
    contract.check_backward(
        compressed_attention_bwd, torch.randn_like(o), dlse, *tensors, o, lse, *constants
    )


def test_gradients_of_output_and_lse():
    case = contract.SEEING
    contract.check_gradients(
        lambda *tensors: compressed_attention(*tensors, **_options(case)),
        *_tensors(case).values(),
    )


def test_gradients_of_packed_sequences():
    """Of the output alone: here lse is -inf in places, where differences mean nothing."""
    case = contract.GRADCHECK[1]
    contract.check_gradients(
        lambda *tensors: compressed_attention(*tensors, **_options(case))[0],
        *_tensors(case).values(),
    )


@pytest.mark.parametrize("case", contract.CASES, ids=lambda case: case.name)
def test_compiles_to_one_graph(case):
    contract.check_compiled(
        lambda *tensors: compressed_attention(*tensors, **_options(case)), _tensors(case)
    )


@pytest.mark.parametrize(
    ("size", "stride", "message"),
    [
        (0, 1, "compress_block_size: expected a positive integer, got 0"),
        (4, 0, "compress_stride: expected a positive integer, got 0"),
        (-4, 2, "compress_block_size: expected a positive integer, got -4"),
        (16.0, 2, r"compress_block_size: expected a positive integer, got 16\.0"),
        (4, 3, "compress_stride: expected a divisor of compress_block_size = 4, got 3"),
    ],
    ids=str,
)
def test_checks_the_geometry(size, stride, message):
    q = torch.randn(1, 3, 1, 4)
    with pytest.raises(ValueError, match=f"^{message}"):
        compressed_attention(q, q, q, compress_block_size=size, compress_stride=stride)
