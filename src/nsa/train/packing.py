"""Packing: documents become rows of ``seq_len`` tokens in which they never see each other.

Not a sampler that follows the number of processes: row ``i`` of a run is a function of the corpus,
the seed and ``i`` alone, so that any number of devices, and a run that was killed, see the same
rows at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from nsa.train.corpus import Corpus


class Row(TypedDict):
    """One packed row: token ids, and the lengths of the sequences in it."""

    input_ids: np.ndarray
    lengths: list[int]


class PackedRows(Dataset[Row]):
    """The rows of a whole run, epoch after epoch, each epoch in its own order.

    A document longer than ``seq_len`` is cut into pieces of ``seq_len`` from its start; a full
    piece is a row. Shorter pieces are laid end to end in shuffled order and cut every ``seq_len``
    tokens. What follows a cut is a new sequence. The last row of an epoch may be short: nothing is
    padded or dropped but pieces of one token, which predict nothing.

    Args:
        corpus: encoded documents.
        seq_len: tokens per row.
        num_rows: rows in the run.
        seed: of the order.

    Raises:
        ValueError: the corpus has no two tokens in one document.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, num_rows: int, seed: int) -> None:
        self.corpus = corpus
        self.seq_len = seq_len
        self.num_rows = num_rows
        self.seed = seed
        self._starts, self._lengths = _pieces(corpus.offsets, seq_len)
        if not len(self._starts):
            raise ValueError(
                "data.train: expected documents of at least 2 tokens, found none. Check the files."
            )
        self._epoch = -1
        self._rows: list[np.ndarray] = []
        # Cutting the short pieces at row ends depends on the order, the number of rows does not.
        short = int(self._lengths[self._lengths < seq_len].sum())
        full = int((self._lengths == seq_len).sum())
        remainder = short % seq_len
        self.rows_per_epoch = full + short // seq_len + int(remainder > 1)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        segments = self._segments(index)
        ids = [self.corpus.tokens[start : start + length] for start, length in segments]
        return Row(
            input_ids=np.concatenate(ids).astype(np.int64),
            lengths=[int(length) for _, length in segments],
        )

    def num_tokens(self, first: int, last: int) -> int:
        """Tokens in rows ``first`` to ``last - 1``."""
        return sum(int(self._segments(index)[:, 1].sum()) for index in range(first, last))

    def _segments(self, index: int) -> np.ndarray:
        """``[num_sequences, 2]``: start in the corpus and length of each sequence of a row."""
        epoch, within = divmod(index, self.rows_per_epoch)
        if epoch != self._epoch:
            self._rows = self._pack(epoch)
            self._epoch = epoch
        return self._rows[within]

    def _pack(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self._starts))
        starts, lengths = self._starts[order], self._lengths[order]
        full = lengths == self.seq_len
        pieces = np.stack([starts, lengths], axis=1)
        rows = [piece[None] for piece in pieces[full]]
        rows += _cut(pieces[~full], self.seq_len)
        return [rows[i] for i in rng.permutation(len(rows))]


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Joins rows into one packed batch for ``NSAForCausalLM.forward``.

    Args:
        rows: packed rows.

    Returns:
        ``input_ids`` and ``labels`` int64 ``[1, tokens]``, and ``cu_seqlens`` int32 ``[num_seqs +
        1]``. The label of the first token of a sequence is -100: nothing before it may predict it,
        and loss normalisers do not count it.
    """
    lengths = [length for row in rows for length in row["lengths"]]
    input_ids = torch.from_numpy(np.concatenate([row["input_ids"] for row in rows]))
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.tensor(lengths).cumsum(0)
    labels = input_ids.clone()
    labels[cu_seqlens[:-1].long()] = -100
    return {
        "input_ids": input_ids[None],
        "labels": labels[None],
        "cu_seqlens": cu_seqlens,
    }


def collate_same_shape(rows: Sequence[Row], *, seq_len: int) -> dict[str, Tensor]:
    """``collate`` for a compiled model, which is compiled anew for each shape.

    What rows lack of ``seq_len`` tokens is one more sequence, without labels. Empty sequences at
    the end make ``cu_seqlens`` a power of two long, 64 at least.
    """
    batch = collate(rows)
    num_tokens = len(rows) * seq_len
    room = (0, num_tokens - batch["input_ids"].shape[1])
    length = max(64, 1 << len(batch["cu_seqlens"]).bit_length())
    return {
        "input_ids": pad(batch["input_ids"], room),
        "labels": pad(batch["labels"], room, value=-100),
        "cu_seqlens": pad(
            batch["cu_seqlens"], (0, length - len(batch["cu_seqlens"])), value=num_tokens
        ),
    }


def _pieces(offsets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of every piece of every document, pieces of one token left out."""
    sizes = np.diff(offsets)
    counts = -(-sizes // seq_len)
    document = np.repeat(np.arange(len(sizes)), counts)
    rank = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    lengths = np.minimum(sizes[document] - rank * seq_len, seq_len)
    starts = offsets[document] + rank * seq_len
    return starts[lengths > 1], lengths[lengths > 1]


def _cut(pieces: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Lays pieces ``[n, 2]`` (start, length) end to end and cuts every ``seq_len`` tokens."""
    if not len(pieces):
        return []
    ends = np.cumsum(pieces[:, 1])
    begins = ends - pieces[:, 1]
    total = int(ends[-1])
    edges = np.union1d(begins, np.arange(0, total, seq_len))
    lengths = np.diff(np.append(edges, total))
    piece = np.searchsorted(begins, edges, side="right") - 1
    starts = pieces[piece, 0] + edges - begins[piece]
    segments = np.stack([starts, lengths], axis=1)
    row_begins = np.searchsorted(edges, np.arange(seq_len, total, seq_len))
    rows = np.split(segments, row_begins)
    return rows if int(rows[-1][:, 1].sum()) > 1 else rows[:-1]
