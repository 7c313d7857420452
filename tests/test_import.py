"""``import nsa`` is light: neither transformers nor a GPU, and the heavy names still work."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nsa


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_transformers_nor_cuda():
    code = (
        "import sys, nsa, torch; print('transformers' in sys.modules, torch.cuda.is_initialized())"
    )
    assert run(code) == "False False"


def test_heavy_names_load_when_used():
    code = "import sys, nsa; nsa.NSAModelConfig; print('transformers' in sys.modules)"
    assert run(code) == "True"


def test_light_names_are_there():
    assert all(getattr(nsa, name) for name in nsa.__all__ if name not in nsa._NEED_TRANSFORMERS)
    assert dir(nsa) == sorted(nsa.__all__)


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'nsa' has no attribute 'attention'"):
        _ = nsa.attention
