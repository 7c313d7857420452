"""The public op: the choice, that it has no gradient, and what PyTorch asks of it."""

from dataclasses import astuple

import pytest
import torch
from tests.cases import CASES, SMALL, WIDE, Case, check_select_blocks
from tests.ops import contract

from nsa.ops import compressed_attention, select_blocks
from nsa.ops.select_blocks import config_from, select_blocks_fwd


def _inputs(case):
    tensors = {name: x.to(case.dtype) for name, x in case.tensors().items()}
    _, lse = compressed_attention(
        tensors["q"],
        tensors["k_cmp"],
        tensors["v_cmp"],
        compress_block_size=case.config.compress_block_size,
        compress_stride=case.config.compress_stride,
        **case.where(),
    )
    return tensors["q"], tensors["k_cmp"], lse


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case):
    check_select_blocks(select_blocks, case)


@pytest.mark.parametrize("layout", contract.LAYOUTS)
@pytest.mark.parametrize("case", contract.CASES, ids=lambda case: case.name)
def test_contract(case, layout):
    q, k_cmp, lse = _inputs(case)
    q, k_cmp = (contract.LAYOUTS[layout](x) for x in (q, k_cmp))
    longest = max(case.lengths) if case.packed else None
    geometry = list(astuple(case.config))
    constants = (case.cu_seqlens(), geometry, 0.7, longest, case.offset, "reference")
    contract.check_backward(select_blocks_fwd, q, k_cmp, lse, *constants)


@pytest.mark.parametrize("case", contract.CASES, ids=lambda case: case.name)
def test_compiles_to_one_graph(case):
    inputs = _inputs(case)

    def function(*tensors):
        return select_blocks(*tensors, config=case.config, **case.where())

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), function(*inputs))


def test_the_choice_has_no_gradient():
    q, k_cmp, lse = (x.requires_grad_() for x in _inputs(Case(name="", lengths=(20,))))
    blocks = select_blocks(q, k_cmp, lse, config=SMALL, softmax_scale=0.7)
    assert not blocks.requires_grad


@pytest.mark.parametrize("config", [SMALL, WIDE])
def test_a_config_survives_the_op_schema(config):
    assert config_from(list(astuple(config))) == config


def test_checks_config_and_lse():
    q, k_cmp, lse = _inputs(Case(name="", lengths=(20,)))
    with pytest.raises(ValueError, match=r"^config: expected an nsa\.NSAConfig, got dict"):
        select_blocks(q, k_cmp, lse, config={})
    with pytest.raises(ValueError, match=r"^lse: expected torch\.float32 \[1, 20, 4\]"):
        select_blocks(q, k_cmp, lse.double(), config=SMALL)
    with pytest.raises(ValueError, match=r"^k_cmp: expected at least 9 compressed blocks"):
        select_blocks(q, k_cmp[:, :8], lse, config=SMALL)
