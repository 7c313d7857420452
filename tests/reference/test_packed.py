"""Packed sequences: slots never overlap, sequences never meet, weights' gradients add up."""

import itertools

import pytest
import torch

from nsa.config import NSAConfig
from nsa.reference.packed import SHARED, SLOTS, TOKENS, map_sequences, num_slots


@pytest.mark.parametrize(("size", "stride"), [(4, 2), (4, 4), (6, 2), (1, 1)])
def test_every_sequence_has_its_own_slots(size, stride):
    config = NSAConfig(compress_block_size=size, compress_stride=stride, block_size=12)
    for lengths in itertools.product([0, 1, 3, 4, 5, 9], repeat=3):
        used, start = [], 0
        for length in lengths:
            first = start // stride
            used += range(first, first + config.num_compressed(length))
            start += length
        assert len(used) == len(set(used))
        assert all(slot < num_slots(start, stride) for slot in used)


def _map(function, inputs, axes, lengths):
    return map_sequences(
        function,
        inputs,
        axes,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        compress_block_size=4,
        compress_stride=2,
    )


def test_the_function_gets_each_sequence_alone():
    seen = []

    def function(x, blocks, weight):
        seen.append((x[0].tolist(), blocks[0].tolist(), weight.tolist()))
        return (x * 10,)

    x, blocks, weight = torch.arange(9), torch.arange(4), torch.tensor([7])
    inputs = [(x, TOKENS), (blocks, SLOTS), (weight, SHARED)]
    (out,) = _map(function, inputs, [TOKENS], [5, 0, 4])
    assert torch.equal(out, x * 10)
    # The first call, on an empty sequence, tells the shapes of the outputs.
    assert seen == [
        ([], [], [7]),
        ([0, 1, 2, 3, 4], [0], [7]),
        ([], [], [7]),
        ([5, 6, 7, 8], [2], [7]),
    ]


def test_unused_slots_are_zero():
    def ones(x):
        return (torch.ones(1, max(0, x.shape[1] - 2) // 2),)

    (out,) = _map(ones, [(torch.zeros(9), TOKENS)], [SLOTS], [5, 4])
    assert out.tolist() == [1, 0, 1, 0]


def test_shared_outputs_are_summed():
    total = _map(lambda x: (x.sum(1),), [(torch.arange(9.0), TOKENS)], [SHARED], [5, 0, 4])[0]
    assert total.tolist() == [36]


def test_absent_inputs_stay_absent():
    def function(x, nothing):
        assert nothing is None
        return (x,)

    x = torch.arange(4)
    assert torch.equal(_map(function, [(x, TOKENS), (None, SHARED)], [TOKENS], [4])[0], x)
