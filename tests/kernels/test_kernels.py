"""All kernels in Triton's interpreter against the float64 reference, forward and backward."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compare.py")
CASES = [
    "gqa2-odd-batch",
    "one-token",
    "group3-below-a-block",
    "packed-with-empty-and-single",
]


@pytest.mark.parametrize("case", CASES)
def test_kernels_match_the_reference(case):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), case], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
