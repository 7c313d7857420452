import pytest
import torch

from nsa.bench.shapes import SHAPES
from nsa.bench.workloads import (
    add_selection,
    correlate,
    make_tensors,
    overlap,
    run_compress,
)
from nsa.layers.rotary import rotate

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


def test_the_mean_compressor_has_no_weights_and_the_same_data():
    shape = SHAPES["tiny"]
    mlp, mean = (
        make_tensors(shape, 40, "local", torch.float32, CPU, kind) for kind in ("mlp", "mean")
    )
    assert set(mlp) - set(mean) == {f"{x}_{side}" for x in ("pe", "w1", "w2") for side in "kv"}
    for name in mean:
        assert torch.equal(mlp[name], mean[name]), name
    k_cmp, _ = run_compress(mean, shape.config, "reference")
    block, stride = shape.config.compress_block_size, shape.config.compress_stride
    expected = mean["k_tokens"][:, stride : stride + block].mean(1)
    torch.testing.assert_close(k_cmp[:, 1], expected)


def test_compressed_keys_are_rotated_where_the_angles_are_given():
    shape = SHAPES["tiny"]
    tensors = make_tensors(shape, 60, "local", torch.float32, CPU)
    plain, _ = run_compress(tensors, shape.config, "reference")
    angle = torch.rand(1, 9, 16).repeat(1, 1, 2)
    turned, _ = run_compress(
        {**tensors, "cos_cmp": angle.cos(), "sin_cmp": angle.sin()}, shape.config, "reference"
    )
    count = plain.shape[1]
    torch.testing.assert_close(
        turned, rotate(plain, angle.cos()[:, :count], angle.sin()[:, :count])
    )


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
