"""What this machine is, and which code each operation runs on it (``nsa env``)."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import nsa
from nsa import ops
from nsa.bench.correctness import with_leaves
from nsa.bench.operations import MODES, OPERATIONS
from nsa.bench.shapes import SHAPES
from nsa.bench.workloads import add_selection, make_tensors
from nsa.eval.provenance import commit
from nsa.ops.backend import resolve_backend

LIBRARIES = ("torch", "triton", "transformers", "accelerate", "tokenizers", "datasets", "lm-eval")

# Every environment variable that the package reads.
VARIABLES = {
    "NSA_BACKEND": "reference or kernel: forces the code of every operation",
}


class Route(NamedTuple):
    """Which code an operation runs in each direction, and why."""

    operation: str
    forward: str
    backward: str
    why: str


def provenance(device: torch.device) -> dict[str, object]:
    """Where a measurement came from: machine, versions, commit, command and time."""
    name, dirty = _commit()
    return {
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "python": platform.python_version(),
        "nsa": nsa.__version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": name,
        "dirty": dirty,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def version(library: str) -> str | None:
    """The installed version of a library, or None."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def routes(device: torch.device) -> list[Route]:
    """Runs each operation on a small input and reports which code answered.

    Asking by running is the only answer that cannot go stale: an operation without a kernel says so
    itself.
    """
    shape = SHAPES["tiny"]
    tensors = make_tensors(shape, 70, "random", torch.float32, device)
    tensors = add_selection(tensors, shape.config, "reference")
    backend = resolve_backend(tensors["q"], None)
    forced = os.environ.get("NSA_BACKEND")
    rows = []
    for name, entry in OPERATIONS.items():
        if entry.run is None or not hasattr(ops, name):
            continue
        runs, why = backend, f"NSA_BACKEND={forced}" if forced else f"tensors on {device.type}"
        if "backend" not in inspect.signature(getattr(ops, name)).parameters:
            runs, why = "reference", "plain PyTorch on every device"
        found = {mode: runs if mode in entry.modes else "" for mode in MODES}
        ready = with_leaves(tensors, entry.leaves)
        mode = "forward"
        try:
            outputs = entry.run(ready, shape.config, backend)
            mode = "backward"
            if entry.leaves:
                outputs[0].sum().backward()
        except NotImplementedError as error:
            # Without a forward there is no backward either.
            failed = MODES if mode == "forward" else (mode,)
            found |= dict.fromkeys(failed, "none")
            why = str(error)
        rows.append(Route(name, **found, why=why))
    return rows


def show(console: Console, device: torch.device) -> None:
    """Prints versions, device, the path of each operation and the environment variables."""
    facts = Table("", "", show_header=False, box=None)
    facts.add_row("nsa", nsa.__version__)
    facts.add_row("python", platform.python_version())
    for library in LIBRARIES:
        facts.add_row(library, version(library) or "not installed")
    facts.add_row("device", f"{device} ({device_name(device)})")
    if device.type == "cuda":
        facts.add_row("driver, CUDA", f"{_driver() or 'unknown'}, {torch.version.cuda}")
        major, minor = torch.cuda.get_device_capability(device)
        facts.add_row("capability", f"sm_{major}{minor}")
    else:
        facts.add_row("threads", str(torch.get_num_threads()))
    console.print(facts)
    operations = Table("operation", "forward", "backward", "because")
    for row in routes(device):
        operations.add_row(*row)
    console.print(operations)
    variables = Table("environment variable", "value", "meaning")
    for name, meaning in VARIABLES.items():
        variables.add_row(name, os.environ.get(name, "not set"), meaning)
    console.print(variables)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _first_line(command)


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout this package runs from, and whether its files differ from it.

    Nothing where the package is installed, even if that is inside some other repository.
    """
    found = commit(Path(nsa.__file__).parent)
    if found is None:
        return None, None
    name, _, dirty = found.partition("+")
    return name, bool(dirty)


def _first_line(command: list[str]) -> str | None:
    """First line that a command prints; None if it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
