"""Memory grows linearly with the length: 32,768 tokens fit in a laptop, forward and backward."""

import json
import subprocess
import sys

import pytest

LIMIT_BYTES = 6 * 2**30
# A process of its own, so that the peak is that of this run and of nothing before it.
SCRIPT = """
import json, resource, sys, time
import torch
from nsa.config import NSAConfig
from nsa.ops import nsa_attention

tokens, heads, kv_heads, dim, config = int(sys.argv[1]), 4, 2, 64, NSAConfig.paper()
torch.manual_seed(0)
blocks = config.num_compressed(tokens)
counts = {"cmp": blocks, "slc": tokens, "win": tokens}
keys_values = [torch.randn(1, counts[b], kv_heads, dim) for b in counts for _ in "kv"]
inputs = [torch.randn(1, tokens, heads, dim), *keys_values, torch.rand(1, tokens, heads, 3)]
inputs = [x.requires_grad_() for x in inputs]
start = time.perf_counter()
nsa_attention(*inputs, config=config).square().mean().backward()
finite = all(bool(x.grad.isfinite().all()) for x in inputs)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak_bytes = peak if sys.platform == "darwin" else peak * 1024
print(json.dumps({"bytes": peak_bytes, "s": time.perf_counter() - start, "finite": finite}))
"""


def _measure(tokens: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tokens)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_32k_tokens_train_in_6_gib():
    found = _measure(32768)
    assert found["finite"]
    assert found["bytes"] < LIMIT_BYTES, f"peak {found['bytes'] / 2**30:.2f} GiB"
