"""Decoding through the public op: rows of prefill, untouched cache entries, and its checks."""

from dataclasses import astuple

import pytest
import torch
from tests.cases import NSA_INPUTS, SMALL, Case
from tests.ops import contract
from tests.tolerance import assert_close_to_oracle

from nsa.ops import nsa_attention, nsa_decode
from nsa.ops.nsa_decode import nsa_decode_fwd


def _cache(lengths, num_queries=1, room=32):
    """Float64 inputs of the whole sequences, and the same as newest queries against a cache."""
    whole = Case(name="", lengths=(room,) * len(lengths), dv=3).tensors()
    newest = dict(whole)
    for name in ("q", "gates"):
        newest[name] = torch.stack(
            [x[n - num_queries : n] for x, n in zip(whole[name], lengths, strict=True)]
        )
    return whole, newest


@pytest.mark.parametrize("num_queries", [1, 2])
def test_every_step_is_a_row_of_prefill(num_queries):
    """All lengths from one token on, across every stride, block and window edge, in one call."""
    lengths = list(range(num_queries, 33))
    whole, newest = _cache(lengths, num_queries)

    def prefill(dtype):
        tensors = [whole[name].to(dtype) for name in NSA_INPUTS]
        full = nsa_attention(*tensors, config=SMALL)
        rows = [x[n - num_queries : n] for x, n in zip(full, lengths, strict=True)]
        return torch.stack(rows)

    tensors = [newest[name].float() for name in NSA_INPUTS]
    found = nsa_decode(*tensors, seq_lens=torch.tensor(lengths), config=SMALL)
    assert_close_to_oracle(found, prefill(torch.float64), prefill(torch.float32))


def test_entries_past_a_sequence_are_never_read():
    lengths = [32, 7, 1, 20]
    _, newest = _cache(lengths)
    clean = [newest[name].float() for name in NSA_INPUTS]
    options = {"seq_lens": torch.tensor(lengths).int(), "config": SMALL}
    expected = nsa_decode(*clean, **options)
    for b, length in enumerate(lengths):
        for x in clean[1:3]:
            x[b, SMALL.num_compressed(length) :] = torch.nan
        for x in clean[3:7]:
            x[b, length:] = torch.nan
    assert torch.equal(nsa_decode(*clean, **options), expected)


def test_contract():
    lengths = [32, 7]
    _, newest = _cache(lengths)
    tensors = [newest[name].float() for name in NSA_INPUTS]
    contract.check_backward(
        nsa_decode_fwd, *tensors, torch.tensor(lengths), list(astuple(SMALL)), 0.7
    )


def test_a_gradient_is_refused_with_what_to_do_instead():
    _, newest = _cache([32, 7])
    tensors = [newest[name].float().requires_grad_() for name in NSA_INPUTS]
    o = nsa_decode(*tensors, seq_lens=torch.tensor([32, 7]), config=SMALL)
    message = r"^nsa_decode: it is for inference and has no gradient\. Train with nsa_attention"
    with pytest.raises(NotImplementedError, match=message):
        o.sum().backward()


def test_compiles_to_one_graph():
    lengths = torch.tensor([32, 7])
    _, newest = _cache(lengths.tolist())
    tensors = [newest[name].float() for name in NSA_INPUTS]

    def function(*x):
        return nsa_decode(*x, seq_lens=lengths, config=SMALL)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), function(*tensors))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        pytest.param(
            {}, {"seq_lens": [32, 7]}, r"^seq_lens: expected a tensor, got list", id="lengths-list"
        ),
        pytest.param({}, {"config": None}, r"^config: expected an nsa\.NSAConfig", id="config"),
        pytest.param(
            {"q": torch.zeros(4, 4)}, {}, r"^q: expected \[batch, seq, heads, dim\]", id="rank"
        ),
        pytest.param({"q": torch.zeros(2, 4, 4)}, {}, r"^cu_seqlens: required", id="packed"),
        pytest.param(
            {"gates": torch.zeros(2, 1, 4, 1)}, {}, r"^gates: expected \[2, 1, 4, 3\]", id="gates"
        ),
        pytest.param(
            {"v_cmp": torch.zeros(2, 1, 2, 3)}, {}, r"^v_cmp: expected \[2, 15, 2\]", id="v-cmp"
        ),
        pytest.param(
            {},
            {"seq_lens": torch.tensor([32.0, 7.0])},
            r"^seq_lens: expected int32 or int64 \[2\], got float32",
            id="lengths-dtype",
        ),
        pytest.param(
            {},
            {"seq_lens": torch.tensor([32])},
            r"^seq_lens: expected int32 or int64 \[2\], got int64 \[1\]",
            id="lengths-shape",
        ),
        pytest.param(
            {},
            {"seq_lens": torch.tensor([33, 7])},
            r"^seq_lens: expected lengths from 1 .* to 32 .*, got \[33, 7\]",
            id="too-long",
        ),
        pytest.param(
            {},
            {"seq_lens": torch.tensor([32, 0])},
            r"^seq_lens: expected lengths from 1 .*got \[32, 0\]",
            id="too-short",
        ),
        pytest.param(
            {"k_cmp": torch.zeros(2, 9, 2, 4), "v_cmp": torch.zeros(2, 9, 2, 3)},
            {},
            r"^k_cmp: expected at least 15 compressed blocks for 32 tokens",
            id="short-compressed-cache",
        ),
    ],
)
def test_rejects(changes, options, message):
    _, newest = _cache([32, 7])
    tensors = {name: newest[name].float() for name in NSA_INPUTS} | changes
    with pytest.raises(ValueError, match=message):
        nsa_decode(
            *tensors.values(), **({"seq_lens": torch.tensor([32, 7]), "config": SMALL} | options)
        )


def test_value_dims_must_agree():
    _, newest = _cache([32, 7])
    tensors = {name: newest[name].float() for name in NSA_INPUTS}
    tensors["v_win"] = torch.zeros(2, 32, 2, 5)
    with pytest.raises(ValueError, match=r"^v_cmp, v_slc, v_win: expected one head dim"):
        nsa_decode(*tensors.values(), seq_lens=torch.tensor([32, 7]), config=SMALL)
