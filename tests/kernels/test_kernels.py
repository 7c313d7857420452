"""All kernels in Triton's interpreter against the oracle: values and every gradient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPERATIONS = [
    "compressed_attention",
    "select_blocks",
    "union_blocks",
    "block_lists",
    "sums",
    "selected_attention",
    "window_attention",
    "nsa_attention",
]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_match_the_oracle(operation):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpret", operation],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
