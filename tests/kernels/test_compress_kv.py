"""Compression kernels against the float64 reference.

Run as a program, this file compares one kind. Without a GPU that has to be a process of its own,
since Triton's interpreter is chosen (``TRITON_INTERPRET=1``) before the kernels are imported.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.tolerance import assert_close_to_oracle

from nsa import reference
from nsa.ops.launch import compress_kv as launch

ROOT = Path(__file__).parents[2]
GRADIENTS = ("dx", "dpe", "dw1", "dw2")


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison; packed when ``cu_seqlens`` is given.

    ``value_dim`` if it is not ``dim``: then keys and values need launches of their own.
    """

    seq: int
    num_kv_heads: int
    dim: int
    value_dim: int | None = None
    block: int = 8
    stride: int = 4
    hidden: int = 20
    batch: int = 1
    cu_seqlens: tuple[int, ...] | None = None


CASES = {
    "odd-batch": Case(seq=75, num_kv_heads=2, dim=16, batch=2),
    "dim-24-stride-3": Case(seq=50, num_kv_heads=1, dim=24, block=9, stride=3, batch=2),
    "no-overlap": Case(seq=33, num_kv_heads=3, dim=16, block=8, stride=8, hidden=40),
    "wide": Case(seq=20, num_kv_heads=1, dim=80, batch=2),
    "one-block": Case(seq=8, num_kv_heads=2, dim=16),
    "below-a-block": Case(seq=7, num_kv_heads=2, dim=16, batch=2),
    "no-tokens": Case(seq=0, num_kv_heads=2, dim=16, batch=2),
    "two-parts": Case(seq=520, num_kv_heads=4, dim=16, block=4),
    "two-widths": Case(seq=30, num_kv_heads=2, dim=24, value_dim=16),
    "packed-two-widths": Case(seq=30, num_kv_heads=2, dim=16, value_dim=24, cu_seqlens=(0, 13, 30)),
    "packed": Case(seq=70, num_kv_heads=2, dim=24, cu_seqlens=(0, 0, 1, 38, 39, 39, 47, 54, 70)),
    "packed-aligned": Case(seq=64, num_kv_heads=1, dim=16, cu_seqlens=(0, 16, 16, 24, 64, 64)),
    "packed-nothing-fits": Case(seq=9, num_kv_heads=2, dim=16, cu_seqlens=(0, 1, 2, 9)),
    "packed-below-a-stride": Case(seq=3, num_kv_heads=2, dim=16, cu_seqlens=(0, 3)),
}


def draw(case: Case, kind: str) -> list[tuple]:
    """``(x, pe, w1, w2)`` of keys and of values, in float64."""
    torch.manual_seed(0)
    return [_draw(case, dim, kind) for dim in (case.dim, case.value_dim or case.dim)]


def _draw(case: Case, dim: int, kind: str) -> tuple:
    lead = (case.seq,) if case.cu_seqlens else (case.batch, case.seq)
    flat = dim * (1 if kind == "gated" else case.block)
    rows = case.hidden if kind == "mlp" else dim

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    x = randn(*lead, case.num_kv_heads, dim)
    if kind == "mean":
        return x, None, None, None
    pe, w1 = randn(case.num_kv_heads, case.block, dim), randn(rows, flat) / flat**0.5
    return x, pe, w1, randn(dim, rows) / rows**0.5 if kind == "mlp" else None


def run_reference(dout, inputs, options) -> dict[str, torch.Tensor]:
    """Forward and backward of each side, by ``nsa.reference``."""
    found = {}
    for side, grad, given in zip("kv", dout, inputs, strict=True):
        found[f"out_{side}"] = reference.compress_fwd(*given, **options)
        grads = reference.compress_bwd(grad, *given, **options)
        found |= {f"{name}_{side}": x for name, x in zip(GRADIENTS, grads, strict=True)}
    return found


def run_kernels(dout, inputs, options) -> dict[str, torch.Tensor]:
    """The same by the kernels, which take both sides at once."""
    columns = list(zip(*inputs, strict=True))
    outs = launch.compress_fwd(*columns, **options)
    sides = launch.compress_bwd(dout, *columns, **options)
    found = {}
    for side, out, grads in zip("kv", outs, sides, strict=True):
        found[f"out_{side}"] = out
        found |= {f"{name}_{side}": x for name, x in zip(GRADIENTS, grads, strict=True)}
    return found


def converted(inputs: list[tuple], *to: object) -> list[tuple]:
    """Tensors of each side in another dtype or on another device."""
    return [tuple(None if x is None else x.to(*to) for x in side) for side in inputs]


def compare(name: str, kind: str, dtype: torch.dtype, device: str) -> None:
    """Raises AssertionError where a kernel is off, or where two runs differ."""
    case = CASES[name]
    cu = torch.tensor(case.cu_seqlens, dtype=torch.int32) if case.cu_seqlens else None
    options = {"kind": kind, "compress_block_size": case.block, "compress_stride": case.stride}
    inputs = converted(draw(case, kind), dtype)
    exact = converted(inputs, torch.float64)
    outs = [reference.compress_fwd(*side, cu_seqlens=cu, **options) for side in exact]
    dout = [torch.randn_like(out).to(dtype) for out in outs]
    wide = [grad.double() for grad in dout]
    oracle = run_reference(wide, exact, {"cu_seqlens": cu, **options})
    same = run_reference(dout, inputs, {"cu_seqlens": cu, **options})

    on_device = converted(inputs, device)
    options["cu_seqlens"] = None if cu is None else cu.to(device)
    dout = [grad.to(device) for grad in dout]
    found = run_kernels(dout, on_device, options)
    # The interpreter runs programs one after the other: it cannot show a race.
    again = run_kernels(dout, on_device, options) if device == "cuda" else found
    for key, expected in oracle.items():
        where = f"{name} {kind} {key}"
        assert found[key].dtype == dtype, where
        assert torch.equal(found[key], again[key]), f"{where}: two runs differ"
        assert_close_to_oracle(
            found[key].cpu(), expected, same[key].to(dtype), name=where, magnitude=1.0
        )
    if cu is not None:
        _check_unused_slots(name, found, dout, on_device, options)


def _check_unused_slots(name, found, dout, inputs, options) -> None:
    """They hold exactly zero, and whatever gradient comes for them is ignored."""
    options = dict(options)
    bounds = options["cu_seqlens"].tolist()
    block, stride = options["compress_block_size"], options["compress_stride"]
    unused = torch.ones(dout[0].shape[0], dtype=torch.bool, device=dout[0].device)
    for start, stop in pairwise(bounds):
        blocks = max(stop - start - block + stride, 0) // stride
        unused[start // stride : start // stride + blocks] = False
    for out in (found["out_k"], found["out_v"]):
        assert (out[unused] == 0).all(), f"{name}: an unused slot is not 0"
    poisoned = [torch.where(unused.view(-1, 1, 1), torch.nan, grad) for grad in dout]
    for key, grad in run_kernels(poisoned, inputs, options).items():
        assert torch.equal(grad, found[key]), f"{name} {key}: an unused slot's gradient was read"


KINDS = ("mean", "linear", "gated", "mlp")


@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_kernels_match_the_reference(kind):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, __file__, kind], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_match_the_reference(name, kind, dtype):
    compare(name, kind, dtype, "cuda")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty returns NaN
    for each in CASES:
        compare(each, sys.argv[1], torch.float32, "cpu")
    compare("packed", sys.argv[1], torch.float16, "cpu")
