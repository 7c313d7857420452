"""The call of fla, with a stand-in of the same meaning where fla is not installed."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from nsa import reference
from nsa.bench import fla_attention
from nsa.bench.correctness import WrongResultError, check
from nsa.bench.providers import PROVIDERS, Provider
from nsa.bench.shapes import SHAPES, Shape
from nsa.bench.workloads import make_tensors
from nsa.config import NSAConfig
from nsa.ops import compress_kv, compressed_attention, select_blocks, selected_attention
from nsa.ops import window_attention as our_window

CPU = torch.device("cpu")
WIDE = Shape(
    name="wide",
    num_heads=16,
    num_kv_heads=1,
    key_dim=8,
    value_dim=8,
    seq_lens=(1,),
    config=NSAConfig.tiny(),
)


def parallel_nsa(q, k, v, g_cmp, g_slc, block_counts, block_size):
    """What the documentation of fla says, without a window."""
    config = NSAConfig(
        compress_block_size=block_size,
        compress_stride=block_size,
        block_size=block_size,
        num_selected_blocks=block_counts,
    )
    compress = {"compress_block_size": block_size, "compress_stride": block_size}
    k_cmp, v_cmp = compress_kv(k, v, kind="mean", **compress)
    o_cmp, lse = compressed_attention(q, k_cmp, v_cmp, **compress)
    blocks = select_blocks(q, k_cmp, lse, config=config)
    o_slc = selected_attention(q, k, v, blocks, block_size=block_size)
    zero = torch.zeros_like(g_cmp)
    return reference.combine(o_cmp, o_slc, o_slc, torch.stack((g_cmp, g_slc, zero), -1))


@pytest.fixture
def fla(monkeypatch):
    module = types.ModuleType("fla.ops.nsa")
    module.parallel_nsa = parallel_nsa
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.nsa", module)
    # FlashAttention-2 has no code for CPUs.
    monkeypatch.setattr(
        fla_attention, "window", lambda q, k, v, size: our_window(q, k, v, window_size=size)
    )


def on_the_cpu() -> Provider:
    return replace(PROVIDERS["fla"], backend="reference")


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_it_is_the_shared_pipeline(fla, mode):
    error = check(on_the_cpu(), "shared_pipeline", mode, WIDE, "local", torch.float32, CPU)
    assert 0 <= error < 1e-5


def test_gates_in_another_order_are_caught(fla, monkeypatch):
    swapped = sys.modules["fla.ops.nsa"]
    monkeypatch.setattr(
        swapped,
        "parallel_nsa",
        lambda *args, g_cmp, g_slc, **rest: parallel_nsa(*args, g_cmp=g_slc, g_slc=g_cmp, **rest),
    )
    with pytest.raises(WrongResultError):
        check(on_the_cpu(), "shared_pipeline", "forward", WIDE, "local", torch.float32, CPU)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        pytest.param(SHAPES["tiny"], "groups of a power of two of at least 16", id="group"),
        pytest.param(replace(WIDE, value_dim=16), "keys and values of one width", id="widths"),
        pytest.param(
            replace(WIDE, config=replace(WIDE.config, num_local_blocks=1)),
            "first and the last two blocks, the geometry asks for 1 and 1",
            id="forced",
        ),
    ],
)
def test_what_it_does_not_support_is_refused(fla, shape, message):
    tensors = make_tensors(shape, 40, "random", torch.float32, CPU)
    with pytest.raises(NotImplementedError, match=message):
        fla_attention.shared_pipeline(tensors, shape.config)


def test_without_it_the_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    tensors = make_tensors(WIDE, 40, "random", torch.float32, CPU)
    with pytest.raises(ImportError, match="pip install fla-core"):
        fla_attention.shared_pipeline(tensors, WIDE.config)
