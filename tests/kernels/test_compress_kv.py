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
    """Sizes of one comparison; packed when ``cu_seqlens`` is given."""

    seq: int
    num_kv_heads: int
    dim: int
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
    "packed": Case(seq=70, num_kv_heads=2, dim=24, cu_seqlens=(0, 0, 1, 38, 39, 39, 47, 54, 70)),
    "packed-aligned": Case(seq=64, num_kv_heads=1, dim=16, cu_seqlens=(0, 16, 16, 24, 64, 64)),
    "packed-nothing-fits": Case(seq=9, num_kv_heads=2, dim=16, cu_seqlens=(0, 1, 2, 9)),
    "packed-below-a-stride": Case(seq=3, num_kv_heads=2, dim=16, cu_seqlens=(0, 3)),
}


def draw(case: Case, kind: str) -> tuple:
    """``(x, pe, w1, w2)`` in float64."""
    torch.manual_seed(0)
    lead = (case.seq,) if case.cu_seqlens else (case.batch, case.seq)
    flat = case.dim * (1 if kind == "gated" else case.block)
    rows = case.hidden if kind == "mlp" else case.dim

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    x = randn(*lead, case.num_kv_heads, case.dim)
    if kind == "mean":
        return x, None, None, None
    pe, w1 = randn(case.num_kv_heads, case.block, case.dim), randn(rows, flat) / flat**0.5
    return x, pe, w1, randn(case.dim, rows) / rows**0.5 if kind == "mlp" else None


def run(module, dout, inputs, options) -> dict[str, torch.Tensor]:
    """Forward and backward by ``nsa.reference`` or the kernels."""
    out = module.compress_fwd(*inputs, **options)
    grads = module.compress_bwd(dout, *inputs, **options)
    return {"out": out, **dict(zip(GRADIENTS, grads, strict=True))}


def compare(name: str, kind: str, dtype: torch.dtype, device: str) -> None:
    """Raises AssertionError where a kernel is off, or where two runs differ."""
    case = CASES[name]
    cu = torch.tensor(case.cu_seqlens, dtype=torch.int32) if case.cu_seqlens else None
    options = {"kind": kind, "compress_block_size": case.block, "compress_stride": case.stride}
    inputs = [None if x is None else x.to(dtype) for x in draw(case, kind)]
    exact = [None if x is None else x.double() for x in inputs]
    shape = reference.compress_fwd(*exact, cu_seqlens=cu, **options).shape
    dout = torch.randn(shape, dtype=torch.float64).to(dtype)
    oracle = run(reference, dout.double(), exact, {"cu_seqlens": cu, **options})
    same = run(reference, dout, inputs, {"cu_seqlens": cu, **options})

    on_device = [None if x is None else x.to(device) for x in inputs]
    options["cu_seqlens"] = None if cu is None else cu.to(device)
    dout = dout.to(device)
    found = run(launch, dout, on_device, options)
    # The interpreter runs programs one after the other: it cannot show a race.
    again = run(launch, dout, on_device, options) if device == "cuda" else found
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
    unused = torch.ones(dout.shape[0], dtype=torch.bool, device=dout.device)
    for start, stop in pairwise(bounds):
        blocks = max(stop - start - block + stride, 0) // stride
        unused[start // stride : start // stride + blocks] = False
    assert (found["out"][unused] == 0).all(), f"{name}: an unused slot is not 0"
    poisoned = torch.where(unused.view(-1, 1, 1), torch.nan, dout)
    for key, grad in zip(GRADIENTS, launch.compress_bwd(poisoned, *inputs, **options), strict=True):
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
