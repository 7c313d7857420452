"""The arithmetic that the branches share: chunks, dtypes, rows that see nothing, large logits."""

import pytest
import torch

from nsa.reference import masked_attention
from nsa.reference.masked_attention import (
    compute_dtype,
    masked_attention_bwd,
    masked_attention_fwd,
    probabilities,
    query_chunks,
)


def _causal(k):
    def keys_of(start, stop):
        hi = min(k.shape[1], stop)
        positions = torch.arange(start, stop)[:, None]
        return 0, hi, (torch.arange(hi) <= positions)[None, :, None]

    return keys_of


@pytest.mark.parametrize("num_queries", [0, 1, 7, 1000])
@pytest.mark.parametrize("per_query", [0, 1, 1 << 18, 1 << 30])
def test_chunks_cover_every_query_once(num_queries, per_query):
    cpu = torch.device("cpu")
    chunks = list(query_chunks(num_queries, per_query, cpu))
    assert [t for start, stop in chunks for t in range(start, stop)] == list(range(num_queries))
    limit = masked_attention.CHUNK_ELEMENTS["cpu"]
    if num_queries and per_query <= limit:
        assert max(stop - start for start, stop in chunks) * per_query <= limit


@pytest.mark.parametrize("chunk_elements", [1, 300, 1 << 20])
def test_chunks_do_not_change_the_result(monkeypatch, chunk_elements):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 19, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))

    def run():
        options = {"keys_of": _causal(k), "softmax_scale": 0.5}
        o, lse = masked_attention_fwd(q, k, v, **options)
        return o, lse, *masked_attention_bwd(o.cos(), lse.sin(), q, k, v, o, lse, **options)

    whole = run()
    monkeypatch.setitem(masked_attention.CHUNK_ELEMENTS, "cpu", chunk_elements)
    for part, full in zip(run(), whole, strict=True):
        torch.testing.assert_close(part, full, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_computes_in_float32_at_least(dtype, expected):
    assert compute_dtype(torch.zeros(1, dtype=dtype)) == expected


def test_rows_that_see_nothing_are_zero():
    probs = probabilities(torch.full((2, 3), -torch.inf), torch.full((2,), -torch.inf))
    assert torch.equal(probs, torch.zeros(2, 3))


def test_a_rounded_log_sum_exp_does_not_scale_the_row():
    """Near 1e4 a float32 lse is off by up to 5e-4, which must not reach the probabilities."""
    exact = torch.tensor([1e4, 1e4 - 0.25, 1e4 - 0.5], dtype=torch.float64)
    logits = exact.float()
    probs = probabilities(logits, torch.logsumexp(logits, 0))
    torch.testing.assert_close(probs.double(), torch.softmax(exact, 0), rtol=2e-7, atol=0)
