"""Time and memory of one call."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

Call = Callable[[], object]
LEAST = 5  # The median of two is their mean, which one slow call moves.


class Times(NamedTuple):
    """Quantiles over repetitions, in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


def time_call(call: Call, device: torch.device, *, repeat_ms: int) -> Times:
    """Times ``call`` for about ``repeat_ms`` milliseconds after a warm-up, at least five times.

    On CUDA by Triton's ``do_bench``, which empties the L2 cache between calls; elsewhere by the
    wall clock.
    """
    call()
    if device.type == "cuda":
        # Triton is installed wherever PyTorch has CUDA, but not on every system.
        from triton.testing import do_bench

        torch.cuda.synchronize(device)
        once_ms = _wall_ms(lambda: (call(), torch.cuda.synchronize(device)))
        rep = max(repeat_ms, round(once_ms * (LEAST + 1)))
        measured = do_bench(call, warmup=repeat_ms // 4, rep=rep, quantiles=[0.2, 0.5, 0.8])
        assert isinstance(measured, list), "do_bench returns one time per quantile"
        return Times(*measured)
    samples: list[float] = []
    while len(samples) < LEAST or sum(samples) < repeat_ms:
        samples.append(_wall_ms(call))
    quantiles = torch.quantile(torch.tensor(samples), torch.tensor([0.2, 0.5, 0.8]))
    return Times(*quantiles.tolist())


def _wall_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def as_graph(call: Call) -> Call:
    """``call`` as a CUDA graph on the current stream, which starts all of its kernels at once.

    The stream must not be the default one, and the forward of a backward must have run on it.

    Raises:
        RuntimeError: the call cannot be captured, such as one that waits for the device.
    """
    for _ in range(3):
        call()  # What happens only at first: compilation, caches.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def peak_memory_bytes(call: Call, device: torch.device) -> int | None:
    """Memory that ``call`` needs at its peak on top of what is held before it.

    Returns:
        Bytes: of PyTorch's allocator on CUDA; of the resident set elsewhere, None where Linux's
            /proc is missing.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    process = Path("/proc/self")
    try:
        # Freed memory that the C library keeps would hide the need for it.
        ctypes.CDLL(None).malloc_trim(0)
        (process / "clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _resident(process, "VmRSS")
    call()
    return max(0, _resident(process, "VmHWM") - before)


def kept_memory_bytes(forward: Callable[[], Iterable[Tensor]]) -> int:
    """Memory that waits for the backward after ``forward``: what autograd saved, and the outputs.

    Whole storages, each once however many tensors share it. Inputs that are saved count, since a
    layer must keep them; what a function hides from autograd, as activation checkpointing does
    with its arguments, does not.
    """
    storages: dict[int, UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        # Of storages that live at the same time, none has the address of another.
        storage = x.untyped_storage()
        storages[storage._cdata] = storage
        return x.detach()  # An output that its own graph held would never be freed.

    with saved_tensors_hooks(keep, lambda x: x):
        outputs = tuple(forward())
    for x in outputs:
        keep(x)
    return sum(storage.nbytes() for storage in storages.values())


def _resident(process: Path, field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", (process / "status").read_text(), re.MULTILINE)
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match[1]) * 1024
