"""Packing keeps every token, mixes no documents, and depends on corpus, seed and row alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nsa.train.corpus import Corpus
from nsa.train.packing import PackedRows, Row, collate, collate_same_shape


def _corpus(lengths: list[int]) -> Corpus:
    """Token ``i`` of all is the number ``i``, so that a token tells where it came from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(np.arange(offsets[-1], dtype=np.uint32), offsets, "")


def _epoch(rows: PackedRows, epoch: int) -> list[Row]:
    first = epoch * rows.rows_per_epoch
    return [rows[i] for i in range(first, first + rows.rows_per_epoch)]


lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(
    lambda lengths: max(lengths) > 1
)


@given(lengths=lengths_of_documents, seq_len=st.integers(8, 20), seed=st.integers(0, 5))
def test_an_epoch_is_every_document_once(lengths: list[int], seq_len: int, seed: int) -> None:
    corpus = _corpus(lengths)
    rows = PackedRows(corpus, seq_len=seq_len, num_rows=1000, seed=seed)
    document = np.repeat(np.arange(len(lengths)), lengths)
    # Pieces of one token predict nothing and are left out, as is one that ends an epoch.
    single = {int(corpus.offsets[i + 1]) - 1 for i, n in enumerate(lengths) if n % seq_len == 1}
    for epoch in range(2):
        seen: Counter[int] = Counter()
        sizes = []
        for row in _epoch(rows, epoch):
            ids = row["input_ids"]
            sizes.append(len(ids))
            assert sum(row["lengths"]) == len(ids)
            assert min(row["lengths"]) >= 1
            for part in np.split(ids, np.cumsum(row["lengths"])[:-1]):
                assert (np.diff(part) == 1).all()
                assert len(set(document[part])) == 1
            seen.update(ids.tolist())
        missing = set(range(corpus.num_tokens)) - set(seen)
        assert max(seen.values()) == 1
        assert len(missing - single) <= 1
        assert max(sizes) <= seq_len
        assert sum(size < seq_len for size in sizes) <= 1


def test_long_documents_are_cut_from_their_start_into_whole_rows() -> None:
    rows = PackedRows(_corpus([35]), seq_len=10, num_rows=4, seed=0)
    starts = {int(row["input_ids"][0]): row["lengths"] for row in _epoch(rows, 0)}
    assert starts == {0: [10], 10: [10], 20: [10], 30: [5]}


def test_order_follows_the_seed_and_differs_between_epochs() -> None:
    def tokens(seed: int, epoch: int) -> list[int]:
        rows = PackedRows(_corpus([9] * 50), seq_len=16, num_rows=500, seed=seed)
        return [t for row in _epoch(rows, epoch) for t in row["input_ids"].tolist()]

    assert tokens(0, 0) == tokens(0, 0)
    assert tokens(0, 0) != tokens(1, 0)
    assert tokens(0, 0) != tokens(0, 1)


def test_rows_do_not_depend_on_what_was_read_before() -> None:
    rows = PackedRows(_corpus([9, 30, 4] * 20), seq_len=16, num_rows=200, seed=3)
    forward = [row["input_ids"].tolist() for row in (rows[i] for i in range(200))]
    assert [rows[i]["input_ids"].tolist() for i in reversed(range(200))] == forward[::-1]
    assert rows.num_tokens(5, 9) == sum(map(len, forward[5:9]))
    assert len(rows) == 200
    with pytest.raises(IndexError):
        rows[200]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_see_the_same_rows(num_workers: int) -> None:
    rows = PackedRows(_corpus([9, 30, 4] * 20), seq_len=16, num_rows=40, seed=3)
    loader = DataLoader(rows, batch_size=4, collate_fn=collate, num_workers=num_workers)
    ids = torch.cat([batch["input_ids"][0] for batch in loader])
    assert ids.tolist() == [t for i in range(40) for t in rows[i]["input_ids"].tolist()]


def test_collate_joins_rows_and_masks_first_tokens() -> None:
    batch = collate(
        [
            Row(input_ids=np.array([5, 6, 7]), lengths=[2, 1]),
            Row(input_ids=np.array([8, 9]), lengths=[2]),
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9]]
    assert batch["cu_seqlens"].tolist() == [0, 2, 3, 5]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(("count", "length"), [(1, 64), (62, 64), (63, 128)])
@pytest.mark.parametrize("missing", [0, 3])
def test_batches_of_a_compiled_model_have_one_shape(count: int, length: int, missing: int) -> None:
    rows = [Row(input_ids=np.arange(2 * count), lengths=[2] * count)]
    plain, same = collate(rows), collate_same_shape(rows, seq_len=2 * count + missing)
    end = 2 * count + missing
    bounds = [*plain["cu_seqlens"].tolist(), *[end] * (length - count - 1)]
    assert same["cu_seqlens"].tolist() == bounds
    assert same["cu_seqlens"].dtype == torch.int32
    assert same["input_ids"].shape == (1, end)
    assert torch.equal(same["input_ids"][:, : 2 * count], plain["input_ids"])
    assert same["labels"].tolist() == [[*plain["labels"][0].tolist(), *[-100] * missing]]


def test_corpus_without_anything_to_predict_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.train: expected documents of at least 2 tokens"):
        PackedRows(_corpus([1, 1, 1]), seq_len=8, num_rows=1, seed=0)
