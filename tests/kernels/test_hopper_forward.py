"""The Hopper kernels of the forward: where they apply, and, without a GPU, that they compile well.

``test_gpu.py`` compares what they compute with the oracle.
"""

from unittest import mock

import pytest
import torch
from tests.kernels.resources import Launch, recording, said_by_ptxas, tiles_of

from nsa.ops.launch import hopper_forward
from nsa.ops.launch.tiles import QueryTiles


def tensors(group, dims, packed, dtype=torch.bfloat16):
    """q, k_cmp, v_cmp and cu_seqlens, of which only shapes and dtypes are real."""
    rows, slots = ((4096,), (256,)) if packed else ((2, 4096), (2, 255))
    shapes = ((*rows, 2 * group, dims[0]), (*slots, 2, dims[0]), (*slots, 2, dims[1]))
    cu_seqlens = torch.empty(5, dtype=torch.int32, device="meta") if packed else None
    return [*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes), cu_seqlens]


def attention(group, dims=(128, 128), packed=False, dtype=torch.bfloat16):
    q, k_cmp, v_cmp, cu_seqlens = tensors(group, dims, packed, dtype)
    o, lse = torch.empty_like(q), torch.empty(q.shape[:-1], device="meta")
    hopper_forward.attention_fwd(
        q,
        k_cmp,
        v_cmp,
        o,
        lse,
        cu_seqlens=cu_seqlens,
        geometry={"BLOCK": 32, "STRIDE": 16, "q_offset": 0},
        softmax_scale=0.1,
    )


def scores(group, dims=(128, 128), packed=False):
    q, k_cmp, _, cu_seqlens = tensors(group, dims, packed)
    tiles = QueryTiles.of(q, cu_seqlens, hopper_forward.SCORES.BM // group)
    sums = torch.empty(2**20, device="meta")
    common = {
        **tiles.arguments(),
        "BLOCK": 32,
        "STRIDE": 16,
        "SELECT": 64,
        "own_ptr": sums,
        "next_ptr": sums,
        "T_q": q.shape[-3],
        "q_offset": 0,
        "stride_row": 64,
        "first_tile": 0,
    }
    hopper_forward.block_scores(
        q,
        k_cmp,
        torch.empty(q.shape[:-1], device="meta"),
        softmax_scale=0.1,
        num_tiles=tiles.num_tiles,
        common=common,
    )


CASES = {
    "attention-g16": lambda: attention(16),
    "attention-g1-d64-packed-fp16": lambda: attention(1, (64, 64), True, torch.float16),
    "attention-g3-d192": lambda: attention(3, (192, 128)),
    "scores-g16": lambda: scores(16),
    "scores-g8-d64": lambda: scores(8, (64, 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_products_overlap_and_nothing_spills(case):
    launches: list[Launch] = []
    with recording(launches), tiles_of(90):
        CASES[case]()
    (item,) = launches
    said = said_by_ptxas(item, 90)
    assert "serialized" not in said
    assert "0 bytes spill stores" in said


def test_only_gpus_are_asked_for_their_capability():
    q, k_cmp, v_cmp, _ = tensors(16, (128, 128), False)
    assert not hopper_forward.has_attention(q, k_cmp, v_cmp, 0.1)
    assert not hopper_forward.has_scores(q, k_cmp, 4)


@pytest.mark.parametrize(
    ("group", "dims", "scale", "expected"),
    [
        pytest.param(16, (128, 128), 0.1, True, id="paper"),
        pytest.param(1, (64, 128), 0.1, True, id="two-dims"),
        pytest.param(128, (128, 64), 0.1, True, id="a-tile-of-heads"),
        pytest.param(12, (128, 128), 0.1, True, id="padded-group"),
        pytest.param(256, (128, 128), 0.1, False, id="more-than-a-tile"),
        pytest.param(16, (192, 128), 0.1, True, id="wide-keys"),
        pytest.param(16, (128, 32), 0.1, False, id="narrow-values"),
        pytest.param(16, (128, 128), -0.1, False, id="negative-scale"),
    ],
)
def test_where_attention_applies(group, dims, scale, expected):
    q, k_cmp, v_cmp, _ = tensors(group, dims, False)
    with mock.patch.object(hopper_forward, "can_copy", return_value=True):
        assert hopper_forward.has_attention(q, k_cmp, v_cmp, scale) is expected


@pytest.mark.parametrize(
    ("group", "dims", "expected"),
    [
        pytest.param(4, (128, 128), False, id="small-group"),
        pytest.param(5, (128, 128), True, id="smallest"),
        pytest.param(12, (192, 128), True, id="padded-group"),
        pytest.param(64, (64, 64), True, id="largest"),
        pytest.param(65, (64, 64), False, id="large-group"),
        pytest.param(16, (256, 256), False, id="broad-heads"),
    ],
)
def test_which_layers_hopper_takes(group, dims, expected):
    q, k_cmp, v_cmp, _ = tensors(group, dims, False)
    with mock.patch.object(hopper_forward, "can_copy", return_value=True):
        assert hopper_forward.takes(q, k_cmp, v_cmp) is expected


@pytest.mark.parametrize(
    ("group", "keys_per_block", "expected"),
    [
        pytest.param(16, 4, True, id="paper"),
        pytest.param(12, 1, True, id="padded-group"),
        pytest.param(64, 64, True, id="largest"),
        pytest.param(4, 4, False, id="small-group"),
        pytest.param(128, 4, False, id="large-group"),
        pytest.param(16, 3, False, id="no-power-of-two"),
        pytest.param(16, 128, False, id="more-than-a-step"),
    ],
)
def test_where_scores_apply(group, keys_per_block, expected):
    q, k_cmp, _, _ = tensors(group, (128, 128), False)
    with mock.patch.object(hopper_forward, "can_copy", return_value=True):
        assert hopper_forward.has_scores(q, k_cmp, keys_per_block) is expected


@pytest.mark.parametrize(
    ("num_kv_heads", "tiles", "expected"),
    [(4, 512, 495), (1, 512, 396), (33, 7, 4), (5, 131, 131)],
)
def test_chunks_give_every_multiprocessor_as_many_tiles(num_kv_heads, tiles, expected):
    with tiles_of(90):  # 132 multiprocessors
        found = hopper_forward.whole_rounds(tiles, num_kv_heads, torch.device("cuda"))
    assert found == expected
    assert found * num_kv_heads % 132 == 0 or tiles < 132


@pytest.mark.parametrize(
    ("major", "dtype", "expected"),
    [
        pytest.param(9, torch.bfloat16, True, id="hopper"),
        pytest.param(9, torch.float32, False, id="float32"),
        pytest.param(8, torch.bfloat16, False, id="ampere"),
        pytest.param(10, torch.bfloat16, False, id="blackwell"),
        pytest.param(0, torch.bfloat16, False, id="no-gpu"),
    ],
)
def test_where_the_copy_engine_is(major, dtype, expected):
    x = mock.Mock(dtype=dtype, **{"data_ptr.return_value": 256, "numel.return_value": 4})
    with mock.patch.object(hopper_forward, "capability", return_value=major):
        assert hopper_forward.can_copy(x) is expected
        x.data_ptr.return_value = 264
        assert not hopper_forward.can_copy(x)


def test_all_that_the_copy_engine_reads_is_aligned():
    def make(heads, first=0):
        return torch.zeros(64 * heads * 128 + first, dtype=torch.bfloat16)[first:].view(
            1, 64, heads, 128
        )

    q, do, k, v = make(16), make(16), make(1), make(1)
    keys = {"k_slc": k, "v_slc": v, "k_win": k, "v_win": v}
    with mock.patch.object(hopper_forward, "capability", return_value=9):
        assert hopper_forward.takes(q, k, v, do)
        assert hopper_forward.has_token_attention(q, keys, 64, 0.1)
        for name in keys:
            other = {**keys, name: make(1, first=1)}
            assert not hopper_forward.has_token_attention(q, other, 64, 0.1)
        for i in range(4):
            tensors = [q, k, v, do]
            tensors[i] = make(tensors[i].shape[-2], first=1)
            assert not hopper_forward.takes(*tensors)
