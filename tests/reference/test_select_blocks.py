"""The choice of blocks against explicit sums, and its rules one by one."""

from dataclasses import replace

import pytest
import torch
from tests import oracle
from tests.cases import CASES, SMALL, WIDE, Case, check_select_blocks

from nsa import reference
from nsa.reference.select_blocks import top_blocks

NONE_FORCED = {"num_init_blocks": 0, "num_local_blocks": 0}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case):
    check_select_blocks(reference.select_blocks, case)


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "equal-block-sizes"])
def test_scores_equal_the_double_sum(config):
    case = Case(name="", lengths=(37,), config=config, group=3)
    tensors = case.tensors()
    q, k_cmp = tensors["q"], tensors["k_cmp"]
    _, lse = reference.compressed_attention_fwd(
        q,
        k_cmp,
        tensors["v_cmp"],
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        softmax_scale=0.7,
    )
    found = reference.block_scores(q, k_cmp, lse, 5, 37, config, 0.7)
    expected = oracle.block_scores(q[0], k_cmp[0], config=config, scale=0.7)
    assert found.shape == (1, 32, 2, config.num_blocks(37))
    for t in range(5, 37):
        for head in range(2):
            row = torch.tensor(expected[t][head], dtype=torch.float64)
            part = found[0, t - 5, head, : len(row)]
            torch.testing.assert_close(part, row, rtol=1e-13, atol=1e-15)


def test_a_compressed_block_counts_for_the_blocks_it_overlaps():
    """l = 4, d = 2, l' = 8: block j collects i = 4j - 1 .. 4j + 3 with weights 1, 2, 2, 2, 1."""
    num_compressed = 15
    for i in range(num_compressed):
        k_cmp = torch.full((1, num_compressed, 1, 1), -1e3, dtype=torch.float64)
        k_cmp[0, i] = 1e3
        q, lse = torch.ones(1, 1, 1, 1).double(), torch.full((1, 1, 1), 1e3).double()
        scores = reference.block_scores(q, k_cmp, lse, 0, 1, SMALL, 1.0, q_offset=31)[0, 0, 0]
        expected = [
            {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}.get(i - 4 * j, 0) for j in range(SMALL.num_blocks(32))
        ]
        assert scores.tolist() == expected


def _top(scores: list[float], position: int, **changes) -> list[int]:
    config = replace(SMALL, **changes)
    return (
        top_blocks(torch.tensor(scores).float().view(1, 1, 1, -1), position, config)
        .flatten()
        .tolist()
    )


@pytest.mark.parametrize(
    ("scores", "position", "changes", "expected"),
    [
        pytest.param([0, 5, 9, 1, 0], 39, {}, [0, 2, 4], id="best-of-the-free-ones"),
        pytest.param([0, 5, 5, 5, 0], 39, {}, [0, 1, 4], id="tie-goes-to-the-lower"),
        pytest.param([0, 0, 0, 0, 0], 39, {}, [0, 1, 4], id="all-zero"),
        pytest.param([9, 9, 9, 9, 9], 8, {}, [0, 1, -1], id="fewer-candidates-than-n"),
        pytest.param([9, 9, 9, 9, 9], 7, {}, [0, -1, -1], id="no-future-block"),
        pytest.param([0, 9, 8, 7, 0], 39, {"num_local_blocks": 2}, [0, 3, 4], id="two-local"),
        pytest.param([0, 9, 8, 7, 1], 39, {"num_init_blocks": 0}, [1, 2, 4], id="no-initial"),
        pytest.param([0, 1, 2, 3, 4], 39, {"num_init_blocks": 2}, [0, 1, 4], id="two-initial"),
        pytest.param([3, 9, 8, 7, 1], 39, NONE_FORCED, [1, 2, 3], id="none-forced"),
        pytest.param([1, 2], 8, {"num_init_blocks": 2}, [0, 1, -1], id="forced-twice-counts-once"),
        pytest.param(
            [1, 1, 1, 1], 31, {"num_selected_blocks": 6}, [0, 1, 2, 3, -1, -1], id="n-covers-all"
        ),
    ],
)
def test_rules(scores, position, changes, expected):
    assert _top(scores, position, **changes) == expected


@pytest.mark.parametrize("length", [9, 33, 64, 101])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_keys_tie_exactly(length, dtype):
    """Equal keys make every interior block score the same; rounding must not break the tie."""
    torch.manual_seed(0)
    # Small integers, so that their dot products are exact in any order.
    q = torch.randint(-3, 4, (1, length, 6, 4)).to(dtype)
    k_cmp = torch.ones(1, SMALL.num_compressed(length), 2, 4, dtype=dtype)
    options = {"softmax_scale": 0.7}
    _, lse = reference.compressed_attention_fwd(
        q, k_cmp, k_cmp, compress_block_size=4, compress_stride=2, **options
    )
    blocks = reference.select_blocks(q, k_cmp, lse, config=SMALL, **options)
    for t in range(length):
        own = t // SMALL.block_size
        # Block 1 is the lowest free one with a full score, once block 1's last window has closed.
        if own >= 3:
            assert blocks[0, t].tolist() == [[0, 1, own]] * 2, f"query {t}"


def test_repeated_keys_tie_exactly():
    """The keys of block 1 again in block 3: whichever score is best, 3 never wins over 1."""
    torch.manual_seed(0)
    period = torch.randn(1, 8, 2, 4)
    k_cmp = period.repeat(1, 4, 1, 1)
    q = torch.randn(1, 5, 4, 4)
    options = {"softmax_scale": 1.0, "q_offset": 62}
    _, lse = reference.compressed_attention_fwd(
        q, k_cmp, k_cmp, compress_block_size=4, compress_stride=2, **options
    )
    config = replace(SMALL, num_init_blocks=0)
    chosen = reference.select_blocks(q, k_cmp, lse, config=config, **options)
    for row in chosen.flatten(0, 2).tolist():
        free = [j for j in row if j >= 0][:-1]
        for j in free:
            if j >= 4:
                assert j - 2 in free, f"chose {row}"
