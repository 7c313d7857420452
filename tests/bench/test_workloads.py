import pytest
import torch

from nsa.bench.shapes import SHAPES
from nsa.bench.workloads import add_selection, correlate, make_tensors, overlap

CPU = torch.device("cpu")


def test_the_same_arguments_draw_the_same_tensors():
    first, second = (
        make_tensors(SHAPES["tiny"], 40, "local", torch.float32, CPU) for _ in range(2)
    )
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_shapes_and_dtype_follow_the_shape():
    shape = SHAPES["paper"]
    tensors = make_tensors(shape, 5, "random", torch.bfloat16, CPU)
    assert tensors["q"].shape == (1, 5, 64, 192)
    assert tensors["k_slc"].shape == (1, 5, 4, 192)
    assert tensors["v_win"].shape == (1, 5, 4, 128)
    assert tensors["gates"].shape == (1, 5, 64, 3)
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}


def test_correlate_is_the_recurrence():
    noise = torch.randn(1, 77, 2, dtype=torch.float64)
    rho, expected = 0.9, [noise[:, 0]]
    for t in range(1, 77):
        expected.append(rho * expected[-1] + (1 - rho**2) ** 0.5 * noise[:, t])
    torch.testing.assert_close(correlate(noise.clone(), rho), torch.stack(expected, dim=1))


def test_local_queries_choose_mostly_the_blocks_of_their_neighbours():
    shape = SHAPES["tiny"]
    shares = {}
    for workload in ("random", "local"):
        tensors = make_tensors(shape, 1024, workload, torch.float32, CPU)
        shares[workload] = overlap(
            add_selection(tensors, shape.config, "reference")["block_indices"]
        )
    assert shares["local"] > 0.85
    assert shares["random"] < shares["local"] - 0.2


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        pytest.param([[0, 1, 2], [0, 1, 2]], 1.0, id="same"),
        pytest.param([[0, 1, 2], [3, 4, 5]], 0.0, id="disjoint"),
        pytest.param([[0, 1, 2], [0, 2, 3], [0, 3, 4]], 4 / 6, id="two-of-three"),
        pytest.param([[0, 1, -1], [0, 1, 2]], None, id="first-list-short"),
        pytest.param([[0, 1, 2]], None, id="one-query"),
    ],
)
def test_overlap_counts_shared_blocks(lists, expected):
    block_indices = torch.tensor(lists, dtype=torch.int32)[None, :, None]
    assert overlap(block_indices) == pytest.approx(expected)
