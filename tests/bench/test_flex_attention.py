import sys

import pytest
import torch

from nsa.bench import flex_attention
from nsa.bench.correctness import check
from nsa.bench.providers import PROVIDERS
from nsa.bench.shapes import SHAPES
from nsa.bench.workloads import add_selection, make_tensors

TINY = SHAPES["tiny"]
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning"
)
OPERATIONS = list(PROVIDERS["flex"].operations)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_masks_are_those_of_the_branches(operation, monkeypatch):
    flex = PROVIDERS["flex"]
    monkeypatch.setattr(sys.modules["nsa.bench.correctness"], "add_selection", on_the_cpu)
    error = check(flex, operation, "forward", TINY, "random", torch.float32, CPU)
    assert 0 <= error < 1e-5


def on_the_cpu(tensors, config, _backend):
    return add_selection(tensors, config, "reference")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("seq_len", [300, 384], ids=["odd", "whole-blocks"])
def test_blocks_are_exactly_those_with_something_visible(operation, seq_len, monkeypatch):
    tensors = make_tensors(TINY, seq_len, "random", torch.float32, CPU)
    tensors = add_selection(tensors, TINY.config, "reference")
    masks = []
    make = flex_attention.block_mask
    monkeypatch.setattr(
        flex_attention, "block_mask", lambda *args: masks.append(make(*args)) or masks[-1]
    )
    PROVIDERS["flex"].operations[operation](tensors, TINY.config)
    (mask,) = masks
    num_keys = mask.seq_lengths[1]
    found = mask.to_dense()[0].bool()
    for head in range(found.shape[0]):
        q, k = torch.arange(seq_len)[:, None], torch.arange(num_keys)[None]
        visible = mask.mask_mod(torch.tensor(0), torch.tensor(head), q, k)
        padded = torch.zeros(found.shape[1] * 128, found.shape[2] * 128, dtype=torch.bool)
        padded[:seq_len, :num_keys] = visible
        blocks = padded.view(found.shape[1], 128, found.shape[2], 128).any(3).any(1)
        assert torch.equal(found[head], blocks), head
