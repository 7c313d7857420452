"""What attention modules are given: each misfit is named; no tokens at all are served."""

from __future__ import annotations

import pytest
import torch

from nsa.config import NSAConfig
from nsa.layers import DenseAttention, NativeSparseAttention, default_frequencies, rotation
from nsa.layers.inputs import check_inputs


def inputs(seq: int = 9, batch: int = 2, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    cos, sin = rotation(torch.arange(seq)[None], default_frequencies(8), dtype=torch.float32)
    given = {"hidden_states": torch.randn(batch, seq, 32), "cos": cos, "sin": sin}
    return given | changes


def sparse() -> NativeSparseAttention:
    return NativeSparseAttention(32, 4, 2, 8, 6, config=NSAConfig.tiny(), qk_norm_eps=1e-6)


def dense() -> DenseAttention:
    return DenseAttention(32, 4, 2, 8, 6, qk_norm_eps=1e-6)


MODULES = pytest.mark.parametrize("module", [sparse, dense])
ZEROS = torch.zeros


@MODULES
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"hidden_states": [1.0]}, "^hidden_states: expected a tensor, got list", id="list"
        ),
        pytest.param(
            {"hidden_states": ZEROS(2, 9, 32).long()},
            r"^hidden_states: expected a floating dtype, got int64 \[2, 9, 32\]",
            id="integers",
        ),
        pytest.param(
            {"hidden_states": ZEROS(2, 9, 31)},
            r"^hidden_states: expected \[batch, seq, hidden_size = 32\].* got float32 \[2, 9, 31\]",
            id="width",
        ),
        pytest.param(
            {"hidden_states": ZEROS(9, 32)},
            r"^hidden_states: expected \[batch, seq, .* got float32 \[9, 32\]",
            id="rank",
        ),
        pytest.param(
            {"hidden_states": ZEROS(0, 9, 32)},
            r"^hidden_states: .* at least one sequence, got float32 \[0, 9, 32\]",
            id="empty-batch",
        ),
        pytest.param(
            {"hidden_states": ZEROS(2, 9, 32).bfloat16()},
            r"^hidden_states: expected torch\.float32 like the weights, got torch\.bfloat16\. Cast",
            id="dtype",
        ),
        pytest.param(
            {"cos": ZEROS(1, 8, 8)},
            r"^cos: expected \[2 or 1, 9, rotary_dim\].* got float32 \[1, 8, 8\]\. Make it with",
            id="cos-short",
        ),
        pytest.param(
            {"cos": ZEROS(3, 9, 8)}, r"^cos: expected \[2 or 1, 9, rotary_dim\]", id="cos-rows"
        ),
        pytest.param({"cos": ZEROS(8)}, r"^cos: expected \[2 or 1, 9, rotary_dim\]", id="cos-rank"),
        pytest.param(
            {"cos": ZEROS(1, 9, 10)},
            r"^cos: expected an even rotary_dim up to head_dim = 8, got float32 \[1, 9, 10\]",
            id="cos-wide",
        ),
        pytest.param({"cos": ZEROS(1, 9, 3)}, "^cos: expected an even rotary_dim", id="cos-odd"),
        pytest.param(
            {"sin": ZEROS(1, 9, 8).int()}, "^sin: expected a floating dtype", id="sin-int"
        ),
        pytest.param(
            {"sin": ZEROS(1, 9, 6)},
            r"^sin: expected \[1, 9, 8\] like cos, got float32 \[1, 9, 6\]",
            id="sin",
        ),
    ],
)
def test_what_does_not_fit_is_named(module, changes, message):
    with pytest.raises(ValueError, match=message):
        module()(**inputs(**changes))


@MODULES
def test_one_row_of_cosines_serves_a_batch_with_and_without_its_dimension(module):
    attention, given = module(), inputs()
    bare = given | {name: given[name][0] for name in ("cos", "sin")}
    each = given | {name: given[name].expand(2, -1, -1) for name in ("cos", "sin")}
    expected = attention(**given)
    assert torch.equal(attention(**bare), expected)
    assert torch.equal(attention(**each), expected)


def test_packed_sequences_take_cosines_without_a_dimension_of_rows():
    attention, given = sparse(), inputs(batch=1)
    bare = given | {name: given[name][0] for name in ("cos", "sin")}
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    expected = attention(**given, cu_seqlens=bounds)
    assert torch.equal(attention(**bare, cu_seqlens=bounds), expected)


@MODULES
def test_autocast_takes_other_dtypes(module):
    given = inputs(hidden_states=torch.randn(2, 9, 32, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert module()(**given).dtype == torch.bfloat16


@MODULES
def test_shapes_alone_suffice(module):
    given = {name: x.to("meta") for name, x in inputs().items()}
    assert module().to("meta")(**given).shape == (2, 9, 32)


def test_quantised_weights_take_other_dtypes():
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        check_inputs(**inputs(), hidden_size=32, head_dim=8, dtype=dtype)


@pytest.mark.parametrize(
    ("module", "batch", "packing"),
    [
        pytest.param(sparse, 2, {}, id="sparse-batch"),
        pytest.param(
            sparse, 1, {"cu_seqlens": torch.tensor([0, 0], dtype=torch.int32)}, id="sparse-packed"
        ),
        pytest.param(dense, 2, {}, id="dense-batch"),
        pytest.param(dense, 1, {"lengths": [0]}, id="dense-packed"),
    ],
)
def test_no_tokens(module, batch, packing):
    attention, given = module(), inputs(seq=0, batch=batch)
    x = given["hidden_states"].requires_grad_()
    out = attention(**given, **packing)
    assert out.shape == (batch, 0, 32)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in attention.parameters())
