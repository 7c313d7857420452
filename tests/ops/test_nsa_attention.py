"""The whole of eq. 5 through the public op: values, all gradients, tracing, and its checks."""

import shutil
from dataclasses import astuple

import pytest
import torch
from tests.cases import (
    CASES,
    NSA_INPUTS,
    SMALL,
    Case,
    check_nsa_attention,
)
from tests.comparison import values_and_gradients
from tests.ops import contract

from nsa.ops import CompressorWeights, compress_kv, nsa_attention, select_blocks
from nsa.ops.nsa_attention import (
    LISTS,
    NOTHING,
    OUTPUTS,
    nsa_attention_bwd,
    nsa_attention_fwd,
)


def _tensors(case):
    return {name: case.tensors()[name].to(case.dtype) for name in NSA_INPUTS}


def _function(case):
    return lambda *tensors: nsa_attention(*tensors, config=case.config, **case.where())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case):
    check_nsa_attention(nsa_attention, case)


@pytest.mark.parametrize("case", contract.GRADCHECK, ids=lambda case: case.name)
def test_gradients(case):
    contract.check_gradients(_function(case), *_tensors(case).values())


def test_gradients_through_compression():
    """From the output to raw tokens, compressor weights and positions, as a layer uses it."""
    case = Case(name="", lengths=(9,), dk=2, dv=2, kv_heads=1)
    torch.manual_seed(0)
    pe, w1, w2 = torch.randn(1, 4, 2), torch.randn(3, 8), torch.randn(2, 3)
    tensors = case.tensors()

    def function(q, k, v, gates, *weights):
        phi = CompressorWeights(*weights)
        k_cmp, v_cmp = compress_kv(
            k, v, phi, phi, kind="mlp", compress_block_size=4, compress_stride=2
        )
        return nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, config=SMALL)

    inputs = [tensors[name] for name in ("q", "k_slc", "v_slc", "gates")]
    contract.check_gradients(function, *inputs, pe, w1, w2)


def test_no_gradient_flows_through_the_choice():
    """With the selected branch alone, what only decides the choice gets gradients of exactly 0."""
    tensors = {
        name: x.requires_grad_() for name, x in _tensors(Case(name="", lengths=(40,))).items()
    }
    gates = torch.zeros(1, 40, 4, 3)
    gates[..., 1] = 1.0
    tensors["gates"] = gates
    nsa_attention(*tensors.values(), config=SMALL).square().sum().backward()
    assert not tensors["k_cmp"].grad.any()
    assert not tensors["v_cmp"].grad.any()
    assert tensors["k_slc"].grad.any()


@pytest.mark.parametrize("case", contract.CASES, ids=lambda case: case.name)
def test_compiles_to_one_graph(case):
    contract.check_compiled(_function(case), _tensors(case))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_compiles_with_inductor():
    """Generated code may round differently, by no more than a few units in the last place."""
    case = contract.CASES[0]
    compiled = torch.compile(_function(case), fullgraph=True)
    tensors = _tensors(case).values()
    torch.testing.assert_close(compiled(*tensors), _function(case)(*tensors), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep", [NOTHING, LISTS, OUTPUTS])
@pytest.mark.parametrize("case", contract.CASES, ids=lambda case: case.name)
def test_custom_ops(case, keep):
    where = case.where()
    common = (
        where["cu_seqlens"],
        list(astuple(case.config)),
        where["softmax_scale"],
        max(case.lengths) if case.packed else None,
        where["q_offset"],
        keep,
        "reference",
    )
    tensors = list(_tensors(case).values())
    if keep == OUTPUTS:
        contract.check_forward(nsa_attention_fwd, *tensors, *common)
    o, *saved = nsa_attention_fwd(*tensors, *common)
    if keep == NOTHING:
        assert not any(x.numel() for x in saved)
    else:
        contract.check_backward(nsa_attention_bwd, torch.randn_like(o), *tensors, saved, *common)


def test_recomputing_gives_the_same_gradients_and_keeps_less():
    case = Case(name="", lengths=(40,))
    kept = {}

    def function(recompute):
        def run(*tensors):
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x: sizes.append(x.numel()) or x, lambda x: x
            ):
                o = nsa_attention(*tensors, config=SMALL, recompute=recompute)
            kept[recompute] = sum(sizes)
            return o

        return run

    plain, again = (
        values_and_gradients(function(recompute), _tensors(case), seed=0)
        for recompute in (False, True)
    )
    for name, x in plain.items():
        assert torch.equal(x, again[name]), name
    assert kept[False] - kept[True] == 3 * plain["out0"].numel()


def _bad(**changes):
    return _tensors(Case(name="", lengths=(9,))) | changes


@pytest.mark.parametrize("operation", [nsa_attention, select_blocks], ids=["attention", "blocks"])
def test_a_length_that_is_too_small_is_refused(operation):
    case = Case(name="", lengths=(5, 9), packed=True)
    tensors = _tensors(case)
    if operation is select_blocks:
        tensors = {"q": tensors["q"], "k_cmp": tensors["k_cmp"], "lse": torch.zeros(14, 4)}

    def run(max_seqlen):
        return operation(
            *tensors.values(), config=SMALL, cu_seqlens=case.cu_seqlens(), max_seqlen=max_seqlen
        )

    for enough in (9, 30):
        assert torch.equal(run(enough), run(None))
    with pytest.raises(ValueError, match=r"^max_seqlen: expected at least 9, the longest .*got 8"):
        run(8)
    for wrong in (True, -1, 9.0):
        with pytest.raises(ValueError, match=rf"^max_seqlen: expected an int .*got {wrong}"):
            run(wrong)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        pytest.param(
            _bad(), {"config": {}}, r"^config: expected an nsa\.NSAConfig, got dict", id="config"
        ),
        pytest.param(
            _bad(gates=torch.zeros(1, 9, 4, 2)),
            {},
            r"^gates: expected \[1, 9, 4, 3\], one gate per branch",
            id="gates",
        ),
        pytest.param(
            _bad(k_slc=torch.zeros(1, 8, 2, 4)),
            {},
            r"^v_slc: expected \[1, 8, 2\] \+ \[dim\] like k_slc",
            id="k-slc",
        ),
        pytest.param(
            _bad(k_win=torch.zeros(1, 8, 2, 4), v_win=torch.zeros(1, 8, 2, 4)),
            {},
            r"^k_win: expected at least 9 keys",
            id="short-window-keys",
        ),
        pytest.param(
            _bad(v_win=torch.zeros(1, 9, 2, 5)),
            {},
            r"^v_cmp, v_slc, v_win: expected one head dim, .*got 4, 4 and 5",
            id="value-dims",
        ),
        pytest.param(
            _bad(k_cmp=torch.zeros(1, 2, 2, 4), v_cmp=torch.zeros(1, 2, 2, 4)),
            {},
            r"^k_cmp: expected at least 3 compressed blocks for 9 tokens",
            id="short-compressed-keys",
        ),
        pytest.param(_bad(), {"q_offset": 3}, r"^k_slc: expected at least 12 keys", id="offset"),
        pytest.param(
            _bad(),
            {"softmax_scale": float("nan")},
            r"^softmax_scale: expected a finite",
            id="scale",
        ),
        pytest.param(
            _bad(),
            {"backend": "gpu"},
            r"^backend: expected one of reference, kernel, got 'gpu'",
            id="backend",
        ),
        pytest.param(
            _bad(), {"max_seqlen": 9}, r"^max_seqlen: expected .*None with a batch", id="max-seqlen"
        ),
        pytest.param(
            _bad(),
            {"cu_seqlens": torch.tensor([0, 9]).int()},
            r"^cu_seqlens: expected None",
            id="cu-seqlens",
        ),
    ],
)
def test_rejects(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        nsa_attention(*tensors.values(), **({"config": SMALL} | options))
