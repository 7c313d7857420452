from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tests.inspect.sample import CONFIG, SCALE, layer, tensors

from nsa.reference.masked_attention import CHUNK_ELEMENTS

LENGTHS = [
    pytest.param(1, id="one-token"),
    pytest.param(7, id="no-compressed-block"),
    pytest.param(32, id="reads-everything"),
    pytest.param(101, id="odd-and-sparse"),
]


def read_tokens(blocks: np.ndarray, t: int) -> set[int]:
    """Positions that query ``t`` reads in full, from the definition."""
    size = CONFIG.block_size
    in_blocks = {s for b in blocks if b >= 0 for s in range(b * size, (b + 1) * size)}
    window = set(range(max(0, t - CONFIG.window_size + 1), t + 1))
    return {s for s in in_blocks | window if s <= t}


def dense_rows(q: torch.Tensor, k: torch.Tensor) -> np.ndarray:
    """Dense causal attention ``[T, K, T]``, mean over the two query heads of a kv head."""
    num_tokens = q.shape[1]
    logits = torch.einsum("thd,shd->hts", q[0], k[0].repeat_interleave(2, 1)) * SCALE
    past = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    mass = logits.masked_fill(~past, -torch.inf).softmax(-1)
    return mass.unflatten(0, (2, 2)).mean(1).transpose(0, 1).numpy()


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_recall_is_the_dense_mass_on_the_tokens_read(num_tokens):
    given, measured = tensors(num_tokens), layer(num_tokens, twin=True)
    own = dense_rows(given["q"], given["k_slc"])
    of_twin = dense_rows(given["q"].flip(1), given["k_slc"])
    for t in range(num_tokens):
        for head in range(2):
            read = sorted(read_tokens(measured.block_indices[t, head], t))
            window = range(max(0, t - CONFIG.window_size + 1), t + 1)
            assert measured.recall[t, head] == pytest.approx(own[t, head, read].sum(), abs=1e-5)
            assert measured.twin_recall[t, head] == pytest.approx(
                of_twin[t, head, read].sum(), abs=1e-5
            )
            assert measured.window_recall[t, head] == pytest.approx(
                own[t, head, list(window)].sum(), abs=1e-5
            )


def test_best_recall_is_the_best_of_all_choices():
    num_tokens = 70
    given, measured = tensors(num_tokens), layer(num_tokens)
    own = dense_rows(given["q"], given["k_slc"])
    for t in range(0, num_tokens, 3):
        blocks = range(t // CONFIG.block_size + 1)
        forced = {0, max(0, blocks[-1] - 1), blocks[-1]}
        free = [b for b in blocks if b not in forced]
        spare = min(len(free), CONFIG.num_selected_blocks - len(forced))
        for head in range(2):
            best = max(
                own[t, head, sorted(read_tokens(np.array([*forced, *more]), t))].sum()
                for more in itertools.combinations(free, spare)
            )
            assert measured.best_recall[t, head] == pytest.approx(best, abs=1e-5)
            assert measured.recall[t, head] <= measured.best_recall[t, head] + 1e-5


def test_overlap_counts_blocks_that_the_query_before_read():
    measured = layer(101)
    assert np.isnan(measured.overlap[0]).all()
    for t in range(1, 101):
        for head in range(2):
            now, before = (set(measured.block_indices[i, head].tolist()) - {-1} for i in (t, t - 1))
            assert measured.overlap[t, head] == pytest.approx(len(now & before) / len(now))


def test_overlap_of_random_choices_is_not_full():
    assert layer(101).overlap[60:].mean() < 0.9


def test_compressed_attention_sums_to_one_once_a_block_is_whole():
    measured = layer(101)
    sums = measured.compressed.astype(np.float32).sum(-1)
    first_whole = CONFIG.compress_block_size - 1
    assert (sums[:first_whole] == 0).all()
    np.testing.assert_allclose(sums[first_whole:], 1, atol=5e-3)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_arrays_have_the_shapes_and_dtypes_that_are_written_down(num_tokens):
    measured = layer(num_tokens)
    expected = {
        "block_indices": ((num_tokens, 2, 4), np.int32),
        "gates": ((num_tokens, 4, 3), np.float32),
        "compressed": ((num_tokens, 2, CONFIG.num_compressed(num_tokens)), np.float16),
    }
    for name in ("overlap", "recall", "window_recall", "best_recall"):
        expected[name] = ((num_tokens, 2), np.float32)
    for name, (shape, dtype) in expected.items():
        array = getattr(measured, name)
        assert (array.shape, array.dtype) == (shape, dtype), name
    assert measured.twin_recall is None


def test_chunks_of_queries_do_not_change_what_is_measured(monkeypatch):
    whole = layer(101, twin=True)
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 1000)
    chunked = layer(101, twin=True)
    np.testing.assert_array_equal(whole.block_indices, chunked.block_indices)
    for name in ("recall", "window_recall", "best_recall", "twin_recall", "compressed"):
        np.testing.assert_allclose(getattr(whole, name), getattr(chunked, name), atol=1e-4)
