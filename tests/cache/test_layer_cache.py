"""The cache of one layer as storage: lengths, windows that close, rollback, rows, memory."""

from __future__ import annotations

import pytest
import torch

from nsa.cache import LayerCache, TokenKV
from nsa.config import NSAConfig

CONFIG = NSAConfig(compress_block_size=4, compress_stride=2, block_size=8, num_selected_blocks=3)
NAMES = TokenKV._fields


def new_tokens(values: torch.Tensor) -> TokenKV:
    """Every field holds the token's number, each field scaled differently."""
    return TokenKV(*[(values * (i + 1.0))[..., None, None].expand(-1, -1, 2, 3) for i in range(6)])


class Phi:
    """The mean, with a record of the blocks that it was asked for."""

    def __init__(self):
        self.first: list[list[int]] = []

    def __call__(self, k, v, first):
        self.first.append(first)
        return tuple(x.unfold(1, 4, 2).mean(-1) for x in (k, v))


def fill(cache: LayerCache, phi: Phi, sizes: list[int], batch: int = 2) -> None:
    for size in sizes:
        start = cache.seq_lens[0] if cache.seq_lens else 0
        numbers = torch.arange(start, start + size).float() + 100 * torch.arange(batch)[:, None]
        cache.append(new_tokens(numbers), phi)


def expected(row: int, length: int) -> list[torch.Tensor]:
    numbers = torch.arange(length).float() + 100 * row
    blocks = CONFIG.num_compressed(length)
    means = torch.stack([numbers[2 * i : 2 * i + 4].mean() for i in range(blocks)] or [numbers[:0]])
    return [means.flatten(), means.flatten() * 2, *[numbers * (i + 1.0) for i in range(2, 6)]]


def assert_holds(cache: LayerCache, rows: dict[int, tuple[int, int]]) -> None:
    """``rows``: cache row -> (original row, length)."""
    found = cache.tensors()
    for row, (original, length) in rows.items():
        for name, tensor, values in zip(NAMES, found, expected(original, length), strict=True):
            stored = tensor[row, : len(values), 1, 2]
            assert torch.allclose(stored, values), f"{name} of row {row}"


@pytest.mark.parametrize(
    "sizes",
    [[1] * 37, [37], [3, 1, 1, 20, 12], [130, 70]],
    ids=["ones", "prefill", "chunks", "growth"],
)
def test_tokens_and_blocks_are_where_they_belong(sizes):
    cache, phi = LayerCache(CONFIG), Phi()
    fill(cache, phi, sizes)
    assert cache.seq_lens == [sum(sizes)] * 2
    assert cache.batch_size == 2
    assert_holds(cache, {0: (0, sum(sizes)), 1: (1, sum(sizes))})


def test_phi_runs_once_per_closed_window():
    cache, phi = LayerCache(CONFIG), Phi()
    fill(cache, phi, [1] * 12)
    # Windows close at tokens 3, 5, 7, 9 and 11.
    assert phi.first == [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4]]


@pytest.mark.parametrize("drop", [0, 1, 2, 3, 9, 20, 50], ids=lambda n: f"drop-{n}")
def test_after_a_crop_other_tokens_take_the_place(drop):
    cache, phi = LayerCache(CONFIG), Phi()
    fill(cache, phi, [20])
    cache.crop(drop)
    kept = max(0, 20 - drop)
    assert cache.seq_lens == [kept, kept]
    wrong = new_tokens(torch.full((2, 7), -1e6))
    cache.append(wrong, phi)
    cache.crop(7)
    fill(cache, phi, [30 - kept])
    assert_holds(cache, {0: (0, 30), 1: (1, 30)})


def test_rows_of_different_lengths():
    cache, phi = LayerCache(CONFIG), Phi()
    numbers = torch.arange(9).float() + torch.tensor([[0.0], [100.0]])
    cache.append(new_tokens(numbers), phi, [9, 2])
    late = torch.stack((torch.arange(9, 16).float(), torch.arange(2, 9).float() + 100))
    cache.append(new_tokens(late), phi, [7, 7])
    assert cache.seq_lens == [16, 9]
    assert_holds(cache, {0: (0, 16), 1: (1, 9)})


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        pytest.param(lambda c: c.reorder(torch.tensor([1, 1])), [1, 1], id="reorder"),
        pytest.param(lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1], id="repeat"),
        pytest.param(lambda c: c.batch_select_indices(torch.tensor([1])), [1], id="select"),
        pytest.param(lambda c: c.batch_select_indices(torch.tensor([False, True])), [1], id="mask"),
    ],
)
def test_rows_move_as_a_whole(change, rows):
    cache, phi = LayerCache(CONFIG), Phi()
    fill(cache, phi, [11])
    change(cache)
    assert cache.batch_size == len(rows)
    assert_holds(cache, {i: (row, 11) for i, row in enumerate(rows)})


def test_changing_rows_of_an_empty_cache_is_nothing():
    cache = LayerCache(CONFIG)
    cache.reorder(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    cache.crop(5)
    assert cache.seq_lens == []


def test_tensors_that_are_the_same_are_stored_once():
    cache, phi = LayerCache(CONFIG), Phi()
    own = new_tokens(torch.zeros(1, 8))
    cache.append(own, phi)
    shared = LayerCache(CONFIG)
    k, raw, v = own.k_slc, own.k_cmp, own.v_slc
    shared.append(TokenKV(raw, v, k, v, k, v), phi)
    found = shared.tensors()
    assert found.k_slc.data_ptr() == found.k_win.data_ptr()
    assert found.v_slc.data_ptr() == found.v_win.data_ptr()
    assert shared.num_bytes < cache.num_bytes
    tokens = 64 * 2 * 3 * 4  # capacity, heads, channels, bytes
    assert cache.num_bytes == 6 * tokens + 2 * tokens


def test_memory_doubles_and_new_memory_is_zero():
    cache, phi = LayerCache(CONFIG), Phi()
    fill(cache, phi, [65])
    before = cache.num_bytes
    fill(cache, phi, [1])
    assert cache.num_bytes > before
    fill(cache, phi, [60])
    cache.crop(0)
    assert all(x.isfinite().all() for x in cache._tokens.values())


def test_stored_tokens_carry_no_graph():
    cache = LayerCache(CONFIG)
    tokens = TokenKV(*[x.clone().requires_grad_() for x in new_tokens(torch.zeros(1, 8))])
    cache.append(tokens, Phi())
    assert not any(x.requires_grad for x in cache.tensors())


def test_reset_frees_and_allows_another_batch():
    cache, phi = LayerCache(CONFIG), Phi()
    fill(cache, phi, [11])
    cache.reset()
    assert cache.num_bytes == 0
    fill(cache, phi, [5], batch=3)
    assert cache.seq_lens == [5, 5, 5]


def test_another_batch_is_an_error():
    cache, phi = LayerCache(CONFIG), Phi()
    fill(cache, phi, [3])
    with pytest.raises(ValueError, match="cache: expected a batch of 2 rows, as it holds, got 1"):
        fill(cache, phi, [1], batch=1)


def test_negative_crop():
    with pytest.raises(ValueError, match="num_tokens: expected at least 0 tokens to drop, got -1"):
        LayerCache(CONFIG).crop(-1)
