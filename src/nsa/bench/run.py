"""Measures cases: check, time, memory, provenance (``nsa bench ops``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from nsa.bench.correctness import WrongResultError, check, output_gradient, with_leaves
from nsa.bench.costs import num_bytes, num_flops
from nsa.bench.environment import provenance
from nsa.bench.operations import MODES, OPERATIONS
from nsa.bench.providers import PROVIDERS
from nsa.bench.results import WIDE, Row, append, terminal_table
from nsa.bench.shapes import SHAPES, Shape
from nsa.bench.timing import Call, peak_memory_bytes, time_call
from nsa.bench.workloads import WORKLOADS, Tensors, add_selection, make_tensors, overlap

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class Case(NamedTuple):
    """One measurement: names of an operation, a mode, a provider and a workload, and a length."""

    operation: str
    mode: str
    provider: str
    seq_len: int
    workload: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to measure. Empty fields mean: whatever fits the device, see ``resolve``.

    Raises:
        ValueError: a name is unknown; the message lists those known.
    """

    device: torch.device
    operations: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    shape: str | None = None
    seq_lens: tuple[int, ...] = ()
    dtype: str | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        for field, names, known in (
            ("operation", self.operations, OPERATIONS),
            ("provider", self.providers, PROVIDERS),
            ("mode", self.modes, MODES),
            ("workload", self.workloads, WORKLOADS),
            ("shape", (self.shape,) if self.shape else (), SHAPES),
            ("dtype", (self.dtype,) if self.dtype else (), DTYPES),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"{field}: expected one of {', '.join(known)}, got {name!r}.")
        for name in self.providers:
            if self.device.type not in PROVIDERS[name].devices:
                raise ValueError(
                    f"provider: {name} runs on {', '.join(PROVIDERS[name].devices)}, but the "
                    f"device is {self.device}."
                )
        for seq_len in self.seq_lens:
            if seq_len < self.resolve_shape().config.compress_block_size:
                raise ValueError(
                    "seq_len: expected at least one compressed block = "
                    f"{self.resolve_shape().config.compress_block_size} tokens, got {seq_len}."
                )

    def resolve_shape(self) -> Shape:
        """The shape asked for, or a default: tiny if quick, the paper's heads on CUDA."""
        default = "paper-d128" if self.device.type == "cuda" else "laptop"
        return SHAPES[self.shape or ("tiny" if self.quick else default)]

    def resolve_dtype(self) -> str:
        """The dtype asked for; else bfloat16 on CUDA and float32 elsewhere."""
        return self.dtype or ("bfloat16" if self.device.type == "cuda" else "float32")

    def cases(self) -> list[Case]:
        """All combinations that exist, by length, workload, operation, provider and mode.

        Dense attention does not depend on the workload and is measured with the first one only. On
        CUDA the reference is measured only if it is asked for: at the lengths that matter there,
        one call takes minutes.
        """
        lengths = self.resolve_shape().seq_lens
        workloads = self.workloads or WORKLOADS
        providers = self.providers or tuple(
            name
            for name, entry in PROVIDERS.items()
            if self.device.type in entry.devices
            and not (name == "reference" and self.device.type == "cuda")
        )
        return [
            Case(operation, mode, provider, seq_len, workload)
            for seq_len in self.seq_lens or (lengths[:1] if self.quick else lengths)
            for workload in workloads
            for operation in self.operations or OPERATIONS
            for provider in providers
            for mode in OPERATIONS[operation].modes
            if PROVIDERS[provider].offers(operation, seq_len)
            and mode in (self.modes or MODES)
            and (OPERATIONS[operation].run is not None or workload == workloads[0])
        ]


def run_and_report(plan: Plan, output: Path, console: Console) -> bool:
    """Measures a plan with a progress bar, appends rows to ``output`` as they come, prints a table.

    Returns:
        Whether there was no problem. Interrupted, the rows so far are on disk.
    """
    cases = plan.cases()
    if not cases:
        raise ValueError(
            "operation, provider: expected a provider that offers the operation at that length."
        )
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for row in measure(plan, cases):
            rows.append(row)
            if "problem" not in row:
                append(output, [row])
            progress.advance(task)
    if not console.is_terminal:
        console.width = max(console.width, WIDE)  # A file or pipe gets every column.
    console.print(terminal_table(rows, console.width))
    for row in rows:
        if "problem" in row:
            case = " ".join(str(row[name]) for name in Case._fields)
            console.print(f"{case}: {row['problem']}", style="red", markup=False, soft_wrap=True)
    measured = sum("problem" not in row for row in rows)
    console.print(f"{measured} of {len(rows)} measured, appended to {output}", highlight=False)
    return measured == len(rows)


def measure(plan: Plan, cases: Iterable[Case]) -> Iterator[Row]:
    """Yields one row a case.

    A row holds the case, p20, p50 and p80 in milliseconds, peak memory on top of the inputs, the
    work and traffic models, the error of the check, the measured overlap of neighbouring queries'
    blocks, and provenance. A case that is wrong, missing or out of memory yields the case and
    ``problem`` instead of numbers.
    """
    origin = provenance(plan.device)
    shape, dtype = plan.resolve_shape(), plan.resolve_dtype()
    for case in cases:
        row: Row = {**case._asdict(), "shape": shape.name, "dtype": dtype, "quick": plan.quick}
        try:
            row |= _measure(case, shape, DTYPES[dtype], plan)
        except WrongResultError as error:
            row["problem"] = f"wrong result: {error}"
        except NotImplementedError as error:
            row["problem"] = f"not offered: {error}"
        except torch.OutOfMemoryError:
            row["problem"] = "out of memory"
        yield row | origin


def _measure(case: Case, shape: Shape, dtype: torch.dtype, plan: Plan) -> Row:
    provider, device = PROVIDERS[case.provider], plan.device
    error = check(provider, case.operation, case.mode, shape, case.workload, dtype, device)
    tensors = make_tensors(shape, case.seq_len, case.workload, dtype, device)
    blocks = None
    if OPERATIONS[case.operation].run is not None:
        tensors = add_selection(tensors, shape.config, provider.backend)
        blocks = tensors["block_indices"]
    timed, whole, outputs = _calls(case, tensors, shape)
    times = time_call(timed, device, repeat_ms=20 if plan.quick else 200)
    return {
        **times._asdict(),
        "peak_memory_bytes": peak_memory_bytes(whole, device),
        "flops": num_flops(case.operation, case.mode, shape, case.seq_len),
        "bytes": num_bytes(case.operation, case.mode, shape, tensors, outputs),
        "error": error,
        "overlap": None if blocks is None else overlap(blocks),
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "key_dim": shape.key_dim,
        "value_dim": shape.value_dim,
        "geometry": list(astuple(shape.config)),
    }


def _calls(
    case: Case, tensors: Tensors, shape: Shape
) -> tuple[Call, Call, tuple[torch.Tensor, ...]]:
    """What is timed, what is weighed (backward: with its forward), and the outputs."""
    entry, prepare = OPERATIONS[case.operation], PROVIDERS[case.provider].operations[case.operation]
    if case.mode == "forward":
        forward = torch.no_grad()(prepare(tensors, shape.config))
        return forward, forward, forward()
    ready = with_leaves(tensors, entry.leaves)
    leaves = [ready[name] for name in entry.leaves]
    forward = prepare(ready, shape.config)
    outputs = forward()
    grads = [output_gradient(x) for x in outputs]

    def backward() -> object:
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, grads)

    return backward, both, outputs
