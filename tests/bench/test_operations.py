from functools import partial

import pytest
import torch

from nsa.bench.correctness import with_leaves
from nsa.bench.operations import OPERATIONS, share
from nsa.bench.shapes import SHAPES
from nsa.bench.timing import kept_memory_bytes
from nsa.bench.workloads import add_selection, make_tensors
from nsa.ops import __all__ as public

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def tensors():
    made = make_tensors(TINY, 100, "random", torch.float32, torch.device("cpu"))
    return add_selection(made, TINY.config, "reference")


def test_every_public_operation_is_measured():
    functions = {name for name in public if name.islower()}
    assert functions <= set(OPERATIONS)


@pytest.mark.parametrize("name", [name for name, entry in OPERATIONS.items() if entry.run])
def test_an_operation_reads_what_it_says_and_its_leaves_all_get_gradients(name, tensors):
    entry = OPERATIONS[name]
    ready = with_leaves({key: tensors[key] for key in entry.reads}, entry.leaves)
    outputs = entry.run(ready, TINY.config, "reference")
    if entry.modes == ("forward",):
        assert not any(x.requires_grad for x in outputs)
        return
    sum(x.square().sum() for x in outputs).backward()
    for leaf in entry.leaves:
        assert ready[leaf].grad is not None, leaf
        assert ready[leaf].grad.abs().sum() > 0, leaf


def test_the_shared_pipeline_has_one_pair_of_keys_and_values_and_whole_blocks(tensors):
    viewed, config = share(tensors, TINY.config)
    assert config.compress_block_size == config.compress_stride == config.block_size
    for name in ("k_tokens", "k_win"):
        assert viewed[name] is tensors["k_slc"]
    (shared,) = OPERATIONS["shared_pipeline"].run(tensors, TINY.config, "reference")
    (whole,) = OPERATIONS["pipeline"].run(viewed, config, "reference")
    assert torch.equal(shared, whole)


def test_recomputing_gives_the_same_and_keeps_no_branch_output(tensors):
    found, kept = [], []
    for name in ("pipeline", "recompute_pipeline"):
        entry = OPERATIONS[name]
        ready = with_leaves(tensors, entry.leaves)
        (o,) = entry.run(ready, TINY.config, "reference")
        found.append((o, *torch.autograd.grad(o.sum(), [ready[leaf] for leaf in entry.leaves])))
        kept.append(kept_memory_bytes(partial(entry.run, ready, TINY.config, "reference")))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[0] - kept[1] == 3 * found[0][0].nbytes


def test_only_compression_varies_with_the_compressor():
    varying = {name for name, entry in OPERATIONS.items() if len(entry.compressors) > 1}
    assert varying == {"compress_kv", "pipeline", "recompute_pipeline"}
