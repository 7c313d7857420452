"""Which code an operation runs: argument, then environment, then device."""

import pytest
import torch

from nsa.ops import window_attention
from nsa.ops.backend import no_kernel, resolve_backend

CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("NSA_BACKEND", raising=False)


def test_the_cpu_runs_the_reference():
    assert resolve_backend(CPU, None) == "reference"


@pytest.mark.gpu
def test_a_gpu_runs_the_kernels():
    assert resolve_backend(CPU.cuda(), None) == "kernel"


def test_the_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("NSA_BACKEND", "kernel")
    assert resolve_backend(CPU, None) == "kernel"
    assert resolve_backend(CPU, "reference") == "reference"


def test_an_empty_variable_is_unset(monkeypatch):
    monkeypatch.setenv("NSA_BACKEND", "")
    assert resolve_backend(CPU, None) == "reference"


def test_unknown_names_say_where_they_came_from(monkeypatch):
    with pytest.raises(ValueError, match=r"^backend: expected one of reference, kernel, got 'gpu'"):
        resolve_backend(CPU, "gpu")
    monkeypatch.setenv("NSA_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"^NSA_BACKEND: expected one of .*, got 'triton'"):
        resolve_backend(CPU, None)


def test_a_missing_kernel_says_what_to_do():
    error = no_kernel("window_attention")
    assert isinstance(error, NotImplementedError)
    assert str(error).startswith("window_attention: ")
    assert "backend='reference'" in str(error)
    assert "NSA_BACKEND=reference" in str(error)


def test_the_environment_reaches_the_ops(monkeypatch):
    q = torch.randn(1, 3, 1, 4)
    monkeypatch.setenv("NSA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"^NSA_BACKEND: expected"):
        window_attention(q, q, q, window_size=2)
