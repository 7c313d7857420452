"""Inputs chosen to break arithmetic: extreme logits, equal keys, poisoned memory and caches.

Logits of 1e4 and half precision are also among the cases that every operation is held to.
"""

import pytest
import torch
from tests.cases import HUGE, NSA_INPUTS, SMALL, Case, random_blocks
from tests.comparison import values_and_gradients

from nsa.ops import compress_kv, nsa_attention, select_blocks, selected_attention, window_attention

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CASE = Case(name="", lengths=(33,))
PACKED = Case(name="", lengths=(0, 1, 13, 0, 6, 13), packed=True)


def _run(tensors, case, **options):
    def function(*values):
        return nsa_attention(*values, config=SMALL, **(case.where() | options))

    return values_and_gradients(function, tensors, seed=0)


def _float32(case):
    return {name: case.tensors()[name].float() for name in NSA_INPUTS}


def test_fresh_memory_is_poisoned():
    assert torch.empty(64).isnan().all()
    assert torch.zeros(3).new_empty(64).isnan().all()
    assert torch.empty_like(torch.zeros(64, dtype=torch.bfloat16)).isnan().all()


@pytest.mark.parametrize("case", HUGE, ids=lambda case: case.name)
def test_huge_logits_leave_everything_finite(case):
    tensors = {name: case.tensors()[name].to(case.dtype) for name in NSA_INPUTS}
    for name, x in _run(tensors, case).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("sign", [1, -1], ids=["plus", "minus"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_huge_logits_average_the_values(dtype, sign):
    """Every logit is +-1e4 exactly, so the weights are uniform whatever the sign."""
    q = torch.full((1, 9, 2, 1), 100.0 * sign, dtype=dtype)
    k = torch.full((1, 9, 1, 1), 100.0, dtype=dtype)
    v = torch.arange(9.0).to(dtype).view(1, 9, 1, 1)
    out = window_attention(q, k, v, window_size=9, softmax_scale=1.0)
    expected = torch.arange(9.0).div(2).to(dtype)
    torch.testing.assert_close(out[0, :, 0, 0], expected)
    torch.testing.assert_close(out[0, :, 1, 0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_keys_in_every_branch(dtype):
    """All scores equal: no NaN, no gradient of q, and each branch averages what it sees."""
    tensors = {name: x.to(dtype) for name, x in _float32(CASE).items()}
    for name in ("k_cmp", "k_slc", "k_win"):
        tensors[name] = torch.ones_like(tensors[name])
    found = _run(tensors, CASE)
    for name, x in found.items():
        assert x.isfinite().all(), name
    # The gradient of q is a difference of equal terms.
    assert found["dq"].abs().max() <= 16 * torch.finfo(dtype).eps


def test_values_near_the_largest_float16_do_not_overflow():
    """Sums on the way to an average run in float32."""
    dtype, largest = torch.float16, torch.finfo(torch.float16).max
    q, k = torch.zeros(1, 20, 2, 4, dtype=dtype), torch.zeros(1, 20, 1, 4, dtype=dtype)
    v = torch.full((1, 20, 1, 4), largest, dtype=dtype)
    blocks = torch.zeros(1, 20, 1, 1, dtype=torch.int32)
    assert (window_attention(q, k, v, window_size=16) == largest).all()
    assert (selected_attention(q, k, v, blocks, block_size=32) == largest).all()
    _, v_cmp = compress_kv(k, v, kind="mean", compress_block_size=4, compress_stride=2)
    assert (v_cmp == largest).all()


def test_unused_packed_slots_may_hold_anything():
    clean = _float32(PACKED)
    used, start = torch.zeros(clean["k_cmp"].shape[0], dtype=torch.bool), 0
    for length in PACKED.lengths:
        slot = start // SMALL.compress_stride
        used[slot : slot + SMALL.num_compressed(length)] = True
        start += length
    assert not used.all()
    poisoned = dict(clean)
    for name in ("k_cmp", "v_cmp"):
        poisoned[name] = clean[name].clone()
        poisoned[name][~used] = torch.nan
    expected, found = _run(clean, PACKED), _run(poisoned, PACKED)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
    assert not found["dk_cmp"][~used].any()


def test_keys_past_the_last_query_may_hold_anything():
    """Keys may outnumber queries (a cache with room); what lies past the last query is not read."""
    clean = _float32(Case(name="", lengths=(40,)))
    clean |= {name: clean[name][:, :5] for name in ("q", "gates")}
    case = Case(name="", lengths=(5,), offset=20)
    poisoned = {name: x.clone() for name, x in clean.items()}
    for name in ("k_slc", "v_slc", "k_win", "v_win"):
        poisoned[name][:, 25:] = torch.nan
    for name in ("k_cmp", "v_cmp"):
        poisoned[name][:, SMALL.num_compressed(25) :] = torch.nan
    expected, found = _run(clean, case), _run(poisoned, case)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


def test_block_indices_past_the_sequence_select_nothing():
    case = Case(name="", lengths=(19,))
    tensors, blocks = _float32(case), random_blocks(case)
    q, k, v = tensors["q"], tensors["k_slc"], tensors["v_slc"]
    beyond = torch.where(blocks < 0, 2**31 - 1, blocks)
    expected, found = (selected_attention(q, k, v, b, block_size=8) for b in (blocks, beyond))
    assert torch.equal(found, expected)


def test_scores_that_are_all_zero_choose_the_lowest_blocks():
    """Before any compressed block is visible every score is 0."""
    config = SMALL
    q, k_cmp = torch.randn(1, 3, 2, 4), torch.randn(1, 0, 1, 4)
    lse = torch.full((1, 3, 2), -torch.inf)
    blocks = select_blocks(q, k_cmp, lse, config=config)
    assert blocks.flatten(0, 2).tolist() == [[0, -1, -1]] * 3
