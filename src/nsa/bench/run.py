"""Measures cases: check, time, memory, provenance (``nsa bench ops``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from nsa.bench import traces
from nsa.bench.correctness import WrongResultError, check, output_gradient, with_leaves
from nsa.bench.costs import num_bytes, num_flops
from nsa.bench.environment import provenance
from nsa.bench.operations import MODES, OPERATIONS
from nsa.bench.providers import PROVIDERS, Outputs
from nsa.bench.results import WIDE, Row, append, terminal_table
from nsa.bench.shapes import SHAPES, Shape
from nsa.bench.timing import Call, as_graph, kept_memory_bytes, peak_memory_bytes, time_call
from nsa.bench.workloads import (
    COMPRESSORS,
    TRACE,
    WORKLOADS,
    Tensors,
    add_selection,
    make_tensors,
    overlap,
    present,
)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class Case(NamedTuple):
    """One measurement: what is run by whom on which data.

    ``compressor`` is None where the kind of compressor makes no difference.
    """

    operation: str
    mode: str
    provider: str
    seq_len: int
    workload: str
    compressor: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to measure. Empty fields mean: whatever fits the device, see ``resolve``.

    ``graph``: each call as one CUDA graph, which shows what the device needs where the host is
    slower at starting kernels than the device at running them.

    Raises:
        ValueError: a name is unknown; the message lists those known. Or there is no GPU for graphs.
    """

    device: torch.device
    operations: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    shape: str | None = None
    seq_lens: tuple[int, ...] = ()
    compressors: tuple[str, ...] = ()
    dtype: str | None = None
    quick: bool = False
    graph: bool = False
    one_length: bool = False

    def __post_init__(self) -> None:
        for field, names, known in (
            ("operation", self.operations, OPERATIONS),
            ("provider", self.providers, PROVIDERS),
            ("mode", self.modes, MODES),
            ("workload", self._drawn(), WORKLOADS),
            ("compressor", self.compressors, COMPRESSORS),
            ("shape", (self.shape,) if self.shape else (), SHAPES),
            ("dtype", (self.dtype,) if self.dtype else (), DTYPES),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"{field}: expected one of {', '.join(known)}, got {name!r}.")
        if len(self.workloads) - len(self._drawn()) > 1 or (self.shape and self._trace()):
            raise ValueError(
                "workload: expected at most one trace:FILE, and then no shape: the file has its "
                f"own. Got {', '.join(self.workloads)} and shape {self.shape}."
            )
        if self.graph and self.device.type != "cuda":
            raise ValueError(f"graph: expected a GPU, got {self.device}.")
        for name in self.providers:
            devices = PROVIDERS[name].devices
            if self.device.type not in devices:
                where = f"runs on {', '.join(devices)}" if devices else "is not installed"
                raise ValueError(f"provider: {name} {where}, but the device is {self.device}.")
        for seq_len in self.seq_lens:
            if seq_len < self.resolve_shape().config.compress_block_size:
                raise ValueError(
                    "seq_len: expected at least one compressed block = "
                    f"{self.resolve_shape().config.compress_block_size} tokens, got {seq_len}."
                )

    def _drawn(self) -> tuple[str, ...]:
        return tuple(name for name in self.workloads if not name.startswith(TRACE))

    def _trace(self) -> str | None:
        """The file of a trace, if one is asked for."""
        return next((x.removeprefix(TRACE) for x in self.workloads if x.startswith(TRACE)), None)

    def resolve_shape(self) -> Shape:
        """The trace's shape, that asked for, or a default: tiny if quick, the paper's on CUDA."""
        if trace := self._trace():
            return traces.shape(trace)
        default = "paper-d128" if self.device.type == "cuda" else "laptop"
        return SHAPES[self.shape or ("tiny" if self.quick else default)]

    def resolve_dtype(self) -> str:
        """The dtype asked for; else bfloat16 on CUDA and float32 elsewhere."""
        return self.dtype or ("bfloat16" if self.device.type == "cuda" else "float32")

    def cases(self) -> list[Case]:
        """All combinations that exist, by length, workload, operation, provider and mode.

        Dense attention does not depend on the workload and is measured with the first one only. On
        CUDA the reference is measured only if it is asked for: at the lengths that matter there,
        one call takes minutes. Operations that are not measured by default must be asked for too.
        """
        lengths = self.resolve_shape().seq_lens
        workloads = self.workloads or WORKLOADS
        operations = self.operations or tuple(
            name for name, entry in OPERATIONS.items() if entry.by_default
        )
        providers = self.providers or tuple(
            name
            for name, entry in PROVIDERS.items()
            if self.device.type in entry.devices
            and not (name == "reference" and self.device.type == "cuda")
        )
        return [
            Case(operation, mode, provider, seq_len, workload, compressor)
            for seq_len in self.seq_lens
            or (lengths[:1] if self.quick or self.one_length else lengths)
            for workload in workloads
            for operation in operations
            for compressor in OPERATIONS[operation].compressors
            if compressor is None or compressor in (self.compressors or COMPRESSORS)
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
            case = " ".join(str(row[name]) for name in Case._fields if row[name] is not None)
            console.print(f"{case}: {row['problem']}", style="red", markup=False, soft_wrap=True)
    measured = sum("problem" not in row for row in rows)
    console.print(f"{measured} of {len(rows)} measured, appended to {output}", highlight=False)
    return measured == len(rows)


def measure(plan: Plan, cases: Iterable[Case]) -> Iterator[Row]:
    """Yields one row a case.

    A row holds the case, p20, p50 and p80 in milliseconds, peak memory on top of the inputs, what
    is kept for a backward, the work and traffic models, the error of the check, the measured
    overlap of neighbouring queries' blocks, and provenance. A case that is wrong, missing or out of
    memory yields the case and ``problem`` instead of numbers.
    """
    origin = provenance(plan.device)
    shape, dtype = plan.resolve_shape(), plan.resolve_dtype()
    errors: dict[Case, float] = {}
    for case in cases:
        row: Row = {**case._asdict(), "shape": shape.name, "dtype": dtype}
        row |= {"quick": plan.quick, "graph": plan.graph}
        row["workload"] = case.workload.split(":")[0]
        try:
            # The check does not depend on the length.
            checked = case._replace(seq_len=0)
            if checked not in errors:
                errors[checked] = check_case(case, shape, DTYPES[dtype], plan.device)
            row |= {**_measure(case, shape, DTYPES[dtype], plan), "error": errors[checked]}
        except WrongResultError as error:
            row["problem"] = f"wrong result: {error}"
        except NotImplementedError as error:
            row["problem"] = f"not offered: {error}"
        except torch.OutOfMemoryError:
            row["problem"] = "out of memory"
        except RuntimeError as error:
            # How kernels of others say that they cannot do a case.
            row["problem"] = f"failed: {str(error).splitlines()[0]}"
        yield row | origin


def check_case(case: Case, shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of a case, see ``nsa.bench.correctness``."""
    return check(
        PROVIDERS[case.provider],
        case.operation,
        case.mode,
        shape,
        case.workload,
        dtype,
        device,
        case.compressor or "mlp",
    )


def inputs(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Tensors, Shape, float | None]:
    """Tensors of a case, the shape with the geometry it runs with, and the measured overlap."""
    provider, entry = PROVIDERS[case.provider], OPERATIONS[case.operation]
    kind = case.compressor or "mlp"
    tensors = make_tensors(shape, case.seq_len, case.workload, dtype, device, kind)
    if entry.run is None:
        return tensors, shape, None
    tensors = add_selection(tensors, shape.config, provider.backend)
    viewed, config = entry.view(tensors, shape.config)
    if config != shape.config:
        viewed = add_selection(viewed, config, provider.backend)
    return tensors, replace(shape, config=config), overlap(viewed["block_indices"])


def sizes(shape: Shape) -> Row:
    """The part of a row that says how large the layer is."""
    return {
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "key_dim": shape.key_dim,
        "value_dim": shape.value_dim,
        "geometry": list(astuple(shape.config)),
    }


def _measure(case: Case, shape: Shape, dtype: torch.dtype, plan: Plan) -> Row:
    device, kind = plan.device, case.compressor or "mlp"
    tensors, shown, share = inputs(case, shape, dtype, device)
    # Before the outputs of a forward are kept for its backward to be timed.
    memory = peak_memory_bytes(whole_call(case, tensors, shape), device)
    kept = None
    if case.mode == "backward":
        kept = kept_memory_bytes(_training(case, tensors, shape)[0])
    with torch.cuda.stream(torch.cuda.Stream(device)) if plan.graph else nullcontext():
        timed, outputs = timed_call(case, tensors, shape)
        timed = as_graph(timed) if plan.graph else timed
        times = time_call(timed, device, repeat_ms=20 if plan.quick else 200)
    return {
        **times._asdict(),
        "peak_memory_bytes": memory,
        "kept_memory_bytes": kept,
        "flops": num_flops(case.operation, case.mode, shown, case.seq_len, kind),
        "bytes": num_bytes(case.operation, case.mode, shown, tensors, outputs),
        "overlap": share,
        **sizes(shown),
    }


def whole_call(case: Case, tensors: Tensors, shape: Shape) -> Call:
    """What is weighed: a forward; for the backward, one with its forward."""
    if case.mode == "forward":
        return _inference(case, tensors, shape)
    forward, leaves = _training(case, tensors, shape)
    with torch.no_grad():
        grads = [output_gradient(x) for x in forward()]
    return lambda: torch.autograd.grad(forward(), leaves, grads)


def timed_call(case: Case, tensors: Tensors, shape: Shape) -> tuple[Call, Outputs]:
    """What is timed: a forward, or a backward whose forward is done; and the outputs."""
    if case.mode == "forward":
        forward = _inference(case, tensors, shape)
        return forward, forward()
    forward, leaves = _training(case, tensors, shape)
    outputs = forward()
    grads = [output_gradient(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True), outputs


def _inference(case: Case, tensors: Tensors, shape: Shape) -> Callable[[], Outputs]:
    prepare = PROVIDERS[case.provider].operations[case.operation]
    return torch.no_grad()(prepare(tensors, shape.config))


def _training(
    case: Case, tensors: Tensors, shape: Shape
) -> tuple[Callable[[], Outputs], list[torch.Tensor]]:
    """A forward that a backward can follow, and the tensors that get a gradient."""
    prepare = PROVIDERS[case.provider].operations[case.operation]
    leaves = OPERATIONS[case.operation].leaves
    ready = with_leaves(tensors, leaves)
    return prepare(ready, shape.config), present(leaves, ready)
