"""compute-sanitizer finds no access out of bounds and no race in any kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]  # Three minutes each, alone on a GPU.

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "src" / "nsa" / "kernels"
TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)
# Of warps that start with a part of a kernel: the compiler's words for which part, and with which
# values. They are where a kernel begins or hands over, not in what its parts do.
HAND_OVER = re.compile(r"def |    (gl\.warp_specialize|_run)\(")


def sanitize(tool: str) -> str:
    """What ``tool`` says of the cases in ``sanitized.py``."""
    if TOOL is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not on PATH")
    # PyTorch's own pool would hide the ends of tensors.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [TOOL, "--tool", tool, "--print-limit", "10000"]
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.kernels.sanitized"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "SUMMARY" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stdout


def test_memory_is_accessed_where_it_is():
    report = sanitize("memcheck")
    assert "ERROR SUMMARY: 0 errors" in report, report[:4000]


def test_nothing_races():
    report = sanitize("racecheck")
    places = set(re.findall(r" in (\w+\.py):(\d+)", report))
    found = {}
    for name, line in places:
        source = (KERNELS / name).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        if not HAND_OVER.match(source):
            found[f"{name}:{line}"] = source.strip()
    assert not found, report[:4000]
    assert places or "0 hazards" in report, report[:4000]
