"""Where the time of one call goes: the device time of every kernel it starts (``nsa bench split``).

On CPUs, which start no kernels, the time of every PyTorch operator instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from nsa.bench.environment import provenance
from nsa.bench.results import Row, append, significant
from nsa.bench.run import DTYPES, Case, Plan, check_case, inputs, sizes, timed_call
from nsa.bench.timing import Call

REPEATS = 5


class KernelTime(NamedTuple):
    """Of one kernel in one call: how often it is started and how long it runs in all."""

    kernel: str
    calls: float
    ms: float


def kernel_times(call: Call, device: torch.device) -> list[KernelTime]:
    """Means over some calls after a first one, the longest first."""
    on_gpu = device.type == "cuda"
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiled:
        for _ in range(REPEATS):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = []
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if (event.device_type.name == "CUDA") == on_gpu and microseconds > 0:
            milliseconds = microseconds / 1e3 / REPEATS
            found.append(KernelTime(event.key, event.count / REPEATS, milliseconds))
    return sorted(found, key=lambda item: -item.ms)


def split(plan: Plan, cases: list[Case]) -> Iterator[Row]:
    """Yields one row a kernel of each case, after checking that the case is right.

    Raises:
        WrongResultError: a case is wrong.
    """
    origin, shape = provenance(plan.device), plan.resolve_shape()
    dtype = DTYPES[plan.resolve_dtype()]
    for case in cases:
        error = check_case(case, shape, dtype, plan.device)
        tensors, shown, share = inputs(case, shape, dtype, plan.device)
        timed, _ = timed_call(case, tensors, shape)
        for item in kernel_times(timed, plan.device):
            yield {
                **case._asdict(),
                "workload": case.workload.split(":")[0],
                "shape": shape.name,
                "dtype": plan.resolve_dtype(),
                **item._asdict(),
                "error": error,
                "overlap": share,
                **sizes(shown),
                **origin,
            }


def split_and_report(plan: Plan, output: Path, console: Console) -> None:
    """Appends the rows of each case to ``output`` and prints them as a table."""
    cases = plan.cases()
    if not cases:
        raise ValueError("operation, provider: expected a provider that offers the operation.")
    for case in cases:
        rows = list(split(plan, [case]))
        append(output, rows)
        console.print(_table(case, rows))


def _table(case: Case, rows: list[Row]) -> Table:
    whole = sum(row["ms"] for row in rows)
    named = [str(part) for part in case if part is not None]
    table = Table("kernel", title=f"{' '.join(named)}: {significant(whole)} ms")
    for column in ("calls", "ms", "share"):
        table.add_column(column, justify="right")
    for row in rows:
        # The names of PyTorch's own kernels take several lines of template arguments.
        name = row["kernel"].split("(")[0][:60]
        share = f"{row['ms'] / whole:.1%}"
        table.add_row(name, f"{row['calls']:g}", significant(row["ms"]), share)
    return table
