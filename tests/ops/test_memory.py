"""Memory grows linearly with the length: 32,768 tokens fit in a laptop, forward and backward."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise

import pytest

from nsa.config import NSAConfig

LIMIT_BYTES = 2 * 2**30
# A process of its own, so that the peak is that of this run and of nothing before it.
SCRIPT = '''
import json, resource, sys
from pathlib import Path
import torch
from nsa.config import NSAConfig
from nsa.ops import nsa_attention

geometry, heads, kv_heads, dim, lengths = json.loads(sys.argv[1])
config, peaks = NSAConfig(**geometry), []

def peak():
    """Bytes. On Linux ru_maxrss begins with that of the process that started this one."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().split()
        return int(status[status.index("VmHWM:") + 1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024

torch.manual_seed(0)
for tokens in lengths:
    counts = {"cmp": config.num_compressed(tokens), "slc": tokens, "win": tokens}
    inputs = [torch.randn(1, counts[b], kv_heads, dim) for b in counts for _ in "kv"]
    inputs = [torch.randn(1, tokens, heads, dim), *inputs, torch.rand(1, tokens, heads, 3)]
    inputs = [x.requires_grad_() for x in inputs]
    nsa_attention(*inputs, config=config).square().mean().backward()
    assert all(bool(x.grad.isfinite().all()) for x in inputs)
    del inputs
    peaks.append(peak())
print(json.dumps(peaks))
'''
# glibc then gives back what is freed, at once and slowly: a peak is of what was needed together.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def _peaks(
    config: NSAConfig,
    lengths: list[int],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    environment: dict[str, str] | None = None,
):
    """Bytes of the process at most up to the end of each length."""
    asked = json.dumps([asdict(config), heads, kv_heads, dim, lengths])
    command = [sys.executable, "-c", SCRIPT, asked]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | (environment or {})
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_twice_the_tokens_take_twice_the_memory():
    """A matrix with a row per token and a column per compressed block would take four times."""
    config = NSAConfig(
        compress_block_size=8,
        compress_stride=4,
        block_size=8,
        num_selected_blocks=4,
        window_size=16,
    )
    lengths = [512, 1024, 2048, 4096]
    _, *peaks = _peaks(config, lengths, heads=4, kv_heads=1, dim=32, environment=EXACT)
    first, second = (later - before for before, later in pairwise(peaks))
    # What each thousand tokens takes is the same; the rest is the allocator's.
    assert 0 < second < 2.5 * first, f"{first / 2**20:.1f} MiB, then {second / 2**20:.1f} MiB"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_32k_tokens_train_in_2_gib():
    (peak,) = _peaks(NSAConfig.paper(), [32768], heads=2, kv_heads=1, dim=64)
    assert peak < LIMIT_BYTES, f"peak {peak / 2**30:.2f} GiB"
