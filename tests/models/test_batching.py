"""Layouts: rolling, packing, masks of the dense twin, and masks that cannot be honoured."""

from __future__ import annotations

import pytest
import torch

from nsa.models.batching import check_positions, find_packing, packed_layout, padded_layout

CPU = torch.device("cpu")


def padded(mask: list[list[int]], *, past=(), past_columns=0, rolls=True):
    tensor = torch.tensor(mask)
    shape = (tensor.shape[0], tensor.shape[1] - past_columns)
    return padded_layout(
        shape, tensor, past=list(past), past_columns=past_columns, device=CPU, rolls=rolls
    )


def bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_left_padding_is_rolled_away_and_back():
    layout = padded([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert layout.counts == [2, 4, 0]
    assert layout.longest == 4
    x = torch.arange(12.0).view(3, 4, 1)
    rolled = layout.roll(x)
    assert rolled[0, :, 0].tolist() == [2.0, 3.0, 0.0, 1.0]
    assert torch.equal(layout.roll_back(rolled), x)
    assert layout.positions.tolist() == [[0, 1, 2, 3]] * 3
    assert layout.mask is None


@pytest.mark.parametrize("rolls", [True, False], ids=["nsa", "dense"])
def test_right_padding_needs_neither_roll_nor_mask(rolls):
    layout = padded([[1, 1, 0], [1, 1, 1]], rolls=rolls)
    assert layout.shift is None
    assert layout.mask is None
    assert layout.counts == [2, 3]


def test_no_mask_and_a_mask_of_ones_are_the_same():
    ones = padded([[1, 1, 1]])
    none = padded_layout((1, 3), None, past=[], past_columns=0, device=CPU, rolls=True)
    assert ones.positions.tolist() == none.positions.tolist() == [[0, 1, 2]]
    assert (ones.shift, ones.counts, ones.longest) == (None, None, 3)


def test_positions_go_on_after_cached_tokens():
    layout = padded([[0, 0, 1, 1], [1, 1, 1, 1]], past=[1, 3], past_columns=3)
    assert layout.positions.tolist() == [[1], [3]]
    assert layout.longest == 4
    without = padded_layout((2, 1), None, past=[1, 3], past_columns=3, device=CPU, rolls=True)
    assert without.positions.tolist() == [[1], [3]]


def test_the_dense_mask_is_causal_over_real_columns():
    layout = padded([[0, 1, 1, 1]], past_columns=1, rolls=False)
    assert layout.positions.tolist() == [[0, 1, 2]]
    assert layout.mask[0, 0].int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_a_padded_dense_query_sees_itself_only():
    layout = padded([[0, 0, 1]], rolls=False)
    assert layout.mask[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert layout.positions.tolist() == [[0, 0, 0]]


def test_the_dense_mask_after_a_cache_without_padding():
    layout = padded_layout((1, 2), None, past=[], past_columns=2, device=CPU, rolls=False)
    assert layout.mask[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_packed_positions_restart():
    layout = packed_layout(bounds(0, 2, 2, 5), 1, 5, rolls=True)
    assert layout.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert layout.longest == 3
    assert packed_layout(bounds(0, 2, 5), 1, 5, rolls=False).lengths == [2, 3]


@pytest.mark.parametrize(
    ("position_ids", "expected"),
    [
        pytest.param(None, None, id="none"),
        pytest.param([[0, 1, 2]], None, id="one-sequence"),
        pytest.param([[0, 1], [0, 1]], None, id="two-rows"),
        pytest.param([[0, 1, 0, 0, 1, 2]], [0, 2, 3, 6], id="three-sequences"),
    ],
)
def test_packing_is_found_in_positions(position_ids, expected):
    found = find_packing(None if position_ids is None else torch.tensor(position_ids))
    assert (None if found is None else found.tolist()) == expected


@pytest.mark.parametrize(
    ("cu_seqlens", "batch", "message"),
    [
        pytest.param(bounds(0, 5), 2, r"one row of packed tokens, \[1, tokens\], got 2", id="rows"),
        pytest.param(
            torch.tensor([0, 5]), 1, r"int32 \[num_seqs \+ 1\], got int64 \[2\]", id="int64"
        ),
        pytest.param(bounds(5), 1, r"int32 \[num_seqs \+ 1\], got int32 \[1\]", id="too-short"),
        pytest.param(bounds(0, 4), 1, r"rise from 0 to the number of tokens = 5", id="end"),
        pytest.param(bounds(1, 5), 1, r"rise from 0 .*got \[1, 5\]", id="start"),
        pytest.param(bounds(0, 4, 3, 5), 1, r"rise from 0", id="falls"),
    ],
)
def test_bad_bounds(cu_seqlens, batch, message):
    with pytest.raises(ValueError, match=f"cu_seqlens: expected .*{message}"):
        packed_layout(cu_seqlens, batch, 5, rolls=True)


def test_a_hole_in_the_mask():
    with pytest.raises(
        ValueError, match=r"attention_mask: expected the real tokens.*hole in row 1"
    ):
        padded([[1, 1, 1], [1, 0, 1]])


def test_tokens_after_right_padding_in_the_cache_are_a_hole():
    with pytest.raises(ValueError, match="hole in row 0"):
        padded([[1, 0, 1]], past=[1], past_columns=2)


def test_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"attention_mask: expected \[1, 4\].*got \[1, 3\]"):
        padded_layout((1, 2), torch.ones(1, 3), past=[2], past_columns=2, device=CPU, rolls=True)


def test_a_mask_that_hides_cached_tokens():
    with pytest.raises(ValueError, match=r"expected \[3\] real tokens in the cached columns"):
        padded([[0, 1, 1, 1]], past=[3], past_columns=3)


def test_positions_of_padding_do_not_matter_those_of_tokens_do():
    layout = padded([[0, 0, 1, 1]])
    mask = torch.tensor([[0, 0, 1, 1]])
    check_positions(torch.tensor([[7, 7, 0, 1]]), layout, mask)
    with pytest.raises(ValueError, match="position_ids: expected 1 at row 0, column 3, got 2"):
        check_positions(torch.tensor([[0, 0, 0, 2]]), layout, mask)


def test_one_row_of_positions_serves_all_rows():
    layout = padded_layout((3, 2), None, past=[], past_columns=0, device=CPU, rolls=True)
    check_positions(torch.tensor([[0, 1]]), layout, None)
    with pytest.raises(ValueError, match="position_ids: expected 0 at row 0, column 0, got 4"):
        check_positions(torch.tensor([[4, 5]]), layout, None)
