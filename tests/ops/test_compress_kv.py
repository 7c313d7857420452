"""The public op: values, gradients of tokens, weights and positions, and PyTorch's contract."""

import pytest
import torch
from tests.cases import FEW, KINDS, Case, check_compress_kv, compressor_weights
from tests.ops import contract

from nsa.ops import CompressorWeights, compress_kv
from nsa.ops.compress_kv import compress_kv_bwd, compress_kv_fwd

CASES = [case for case in contract.CASES if case.offset == 0]
PARTS = ("pe", "w1", "w2")


def _weights(case, kind, side):
    return {name: x.to(case.dtype) for name, x in compressor_weights(case, kind, side).items()}


def _tensors(case, kind):
    tokens = {name: case.tensors()[name].to(case.dtype) for name in ("k_slc", "v_slc")}
    return tokens | _weights(case, kind, "k") | _weights(case, kind, "v")


def _function(case, kind):
    names = list(_tensors(case, kind))

    def function(*values):
        given = dict(zip(names, values, strict=True))
        k_weights, v_weights = (
            CompressorWeights(*[given.get(f"{side}_{part}") for part in PARTS]) for side in "kv"
        )
        return compress_kv(
            given["k_slc"],
            given["v_slc"],
            k_weights,
            v_weights,
            kind=kind,
            compress_block_size=case.config.compress_block_size,
            compress_stride=case.config.compress_stride,
            cu_seqlens=case.cu_seqlens(),
        )

    return function


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case", [case for case in FEW if case.offset == 0], ids=lambda case: case.name
)
def test_equals_the_oracle(case, kind):
    check_compress_kv(compress_kv, case, kind)


@pytest.mark.parametrize("layout", contract.LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(case, kind, layout):
    given = _tensors(case, kind)
    tokens = [contract.LAYOUTS[layout](given[name]) for name in ("k_slc", "v_slc")]
    weights = [given.get(f"{side}_{part}") for side in "kv" for part in PARTS]
    sizes = (case.config.compress_block_size, case.config.compress_stride)
    inputs = (*tokens, *weights, case.cu_seqlens(), kind, *sizes, "reference")
    contract.check_forward(compress_kv_fwd, *inputs)
    gradients = [torch.randn_like(x) for x in compress_kv_fwd(*inputs)]
    contract.check_backward(compress_kv_bwd, *gradients, *inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_gradients(kind, packed):
    lengths = (5, 0, 7) if packed else (7, 7)
    case = Case(name="", lengths=lengths, packed=packed, dk=2, dv=3, kv_heads=2)
    contract.check_gradients(_function(case, kind), *_tensors(case, kind).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compiles_to_one_graph(case, kind):
    contract.check_compiled(_function(case, kind), _tensors(case, kind))


def _call(k=None, v=None, phi_k=None, phi_v=None, kind="mean", size=4):
    k = torch.randn(1, 9, 2, 3) if k is None else k
    v = k if v is None else v
    nothing = CompressorWeights()
    return compress_kv(
        k,
        v,
        phi_k or nothing,
        phi_v or nothing,
        kind=kind,
        compress_block_size=size,
        compress_stride=2,
    )


PE, LINEAR = torch.zeros(2, 4, 3), torch.zeros(3, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"kind": "max"},
            r"^kind: expected one of mlp, linear, gated, mean, got 'max'",
            id="kind",
        ),
        pytest.param(
            {"kind": "linear"},
            r"^phi_k\.pe: expected \[2, 4, 3\] for kind 'linear', got None",
            id="pe-missing",
        ),
        pytest.param(
            {"kind": "linear", "phi_k": CompressorWeights(PE, torch.zeros(3, 11))},
            r"^phi_k\.w1: expected \[3, 12\] for kind 'linear', got \[3, 11\]",
            id="w1-shape",
        ),
        pytest.param(
            {"kind": "mlp", "phi_k": CompressorWeights(PE, torch.zeros(5, 12), torch.zeros(3, 4))},
            r"^phi_k\.w2: expected \[3, 5\] for kind 'mlp', got \[3, 4\]",
            id="w2-shape",
        ),
        pytest.param(
            {"kind": "gated", "phi_k": CompressorWeights(PE, torch.zeros(3, 3), PE)},
            r"^phi_k\.w2: expected None for kind 'gated'",
            id="unused-weight",
        ),
        pytest.param(
            {
                "kind": "linear",
                "phi_k": CompressorWeights(PE, LINEAR),
                "phi_v": CompressorWeights(PE, LINEAR.double()),
            },
            r"^phi_v\.w1: expected torch\.float32 on cpu like the tokens, got torch\.float64",
            id="weight-dtype",
        ),
        pytest.param(
            {"v": torch.randn(1, 8, 2, 3)},
            r"^v: expected \[1, 9, 2\] \+ \[dim\] like k",
            id="v-shape",
        ),
        pytest.param(
            {"v": torch.randn(1, 9, 2, 3).double()},
            r"^v: expected torch\.float32 like k",
            id="v-dtype",
        ),
        pytest.param(
            {"size": 3},
            r"^compress_stride: expected a divisor of compress_block_size = 3",
            id="geometry",
        ),
        pytest.param({"size": 16.0}, r"^compress_block_size: expected a positive", id="float"),
        pytest.param(
            {"k": torch.randn(9, 2, 3)}, r"^cu_seqlens: required, because k is packed", id="packed"
        ),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        _call(**arguments)
