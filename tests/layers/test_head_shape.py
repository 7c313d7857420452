"""Head counts and widths that do not fit are named."""

from __future__ import annotations

import pytest

from nsa.layers.head_shape import check_heads


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param((0, 4, 2, 8, 8), "hidden_size: expected a positive int, got 0", id="zero"),
        pytest.param((64, True, 1, 8, 8), "num_heads: expected a positive int", id="bool"),
        pytest.param((64, 4, 2, 8, 8.0), "value_head_dim: expected a positive int", id="float"),
        pytest.param(
            (64, 4, 3, 8, 8), "num_kv_heads: expected a divisor of num_heads = 4.*got 3", id="gqa"
        ),
        pytest.param((64, 4, 2, 7, 8), "head_dim: expected an even number.*got 7", id="odd"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_heads(*sizes)


def test_good_sizes():
    check_heads(64, 6, 3, 8, 5)
