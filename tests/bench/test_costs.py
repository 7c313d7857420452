"""The models against counting by hand and against the paper."""

import pytest
import torch

from nsa.bench.costs import num_bytes, num_flops, visible_pairs
from nsa.bench.operations import OPERATIONS
from nsa.bench.shapes import SHAPES
from nsa.bench.workloads import add_selection, make_tensors

TINY = SHAPES["tiny"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("seq_len", [16, 100, 333], ids=lambda n: f"{n}-tokens")
def test_visible_pairs_are_those_of_the_masks(seq_len):
    config = TINY.config
    t = torch.arange(seq_len)[:, None]
    ends = torch.arange(config.num_compressed(seq_len)) * config.compress_stride
    ends = ends + config.compress_block_size - 1
    distance = t - t.T
    window = (distance >= 0) & (distance < config.window_size)
    assert visible_pairs("dense", TINY, seq_len) == int((distance >= 0).sum())
    assert visible_pairs("window", TINY, seq_len) == int(window.sum())
    assert visible_pairs("compressed", TINY, seq_len) == int((ends <= t).sum())


def test_selected_pairs_are_those_of_a_real_selection():
    tensors = make_tensors(TINY, 333, "random", torch.float32, CPU)
    blocks = add_selection(tensors, TINY.config, "reference")["block_indices"][0, :, 0]
    keys = torch.arange(333)
    seen = (blocks[:, None] == keys[:, None] // TINY.config.block_size).any(-1)
    seen &= keys <= keys[:, None]
    assert visible_pairs("selected", TINY, 333) == int(seen.sum())


def test_decoding_at_64k_reads_what_the_paper_counts():
    # Table 4 of the paper: 5632 tokens of 65536; the compressed ones it rounds up by two.
    shape = SHAPES["paper-d128"]
    tensors = {"q": torch.empty(1, 65536, 1, 1, dtype=torch.bfloat16)}
    per_token = shape.num_kv_heads * 256 * 2
    nsa, dense = (
        num_bytes(operation, "forward", shape, tensors, ()) / per_token
        for operation in ("nsa_decode", "dense_decode")
    )
    assert dense == 65536
    assert nsa == pytest.approx(5632, abs=2)


def test_work_at_64k_is_dense_quadratic_and_sparse_a_seventh():
    shape = SHAPES["paper-d128"]
    dense = num_flops("dense_attention", "forward", shape, 65536)
    assert dense == pytest.approx(4 * 65536**2 / 2 * 64 * 128, rel=1e-4)
    assert num_flops("dense_attention", "backward", shape, 65536) == pytest.approx(2.5 * dense)
    assert dense / num_flops("nsa_attention", "forward", shape, 65536) == pytest.approx(
        7.1, abs=0.1
    )


def test_the_pipeline_is_the_sum_of_its_parts():
    parts = ["compressed_attention", "selected_attention", "window_attention", "compress_kv"]
    for mode, extra in (("forward", ["select_blocks"]), ("backward", [])):
        whole = num_flops("pipeline", mode, TINY, 200)
        assert whole == sum(num_flops(part, mode, TINY, 200) for part in parts + extra)


def test_what_is_computed_again_is_not_counted():
    for mode in ("forward", "backward"):
        again = num_flops("recompute_pipeline", mode, TINY, 200)
        assert again == num_flops("pipeline", mode, TINY, 200)


def test_bytes_are_inputs_and_outputs_and_in_the_backward_their_gradients():
    tensors = make_tensors(TINY, 64, "random", torch.float32, CPU)
    q, k, v = (tensors[name].nbytes for name in OPERATIONS["window_attention"].reads)
    o = (torch.empty_like(tensors["q"]),)
    assert num_bytes("window_attention", "forward", TINY, tensors, o) == q + k + v + q
    assert num_bytes("window_attention", "backward", TINY, tensors, o) == 2 * (q + k + v) + 2 * q


def test_a_mean_costs_an_addition_for_each_value_and_has_no_weights_to_read():
    blocks = TINY.config.num_compressed(200) * TINY.num_kv_heads
    mean = num_flops("compress_kv", "forward", TINY, 200, "mean")
    assert mean == blocks * TINY.config.compress_block_size * (TINY.key_dim + TINY.value_dim)
    assert mean < num_flops("compress_kv", "forward", TINY, 200, "mlp") / 10
    sizes = [
        num_bytes(
            "compress_kv",
            "backward",
            TINY,
            make_tensors(TINY, 64, "random", torch.float32, CPU, kind),
            (),
        )
        for kind in ("mean", "mlp")
    ]
    assert sizes[0] < sizes[1]
