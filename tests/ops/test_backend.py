"""Which code an operation runs: argument, then environment, then device."""

import pytest
import torch

from nsa.ops import window_attention
from nsa.ops.backend import implementation, resolve_backend

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
    assert resolve_backend(CPU, "reference") == "reference"


def test_the_environment_wins_over_the_device(monkeypatch):
    monkeypatch.setenv("NSA_BACKEND", "kernel")
    with pytest.raises(
        ValueError, match=r"^NSA_BACKEND: expected CUDA tensors .* got cpu\..*'reference'"
    ):
        resolve_backend(CPU, None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend(CPU, None) == "kernel"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        pytest.param(
            CPU.double(), "take bfloat16, float16 and float32 tensors, got float64", id="dtype"
        ),
        pytest.param(torch.zeros(1, 257), "take head dims up to 256, got 257", id="head-dim"),
    ],
)
def test_what_the_kernels_cannot_take_says_what_to_do(monkeypatch, tensor, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=f"{message}.*NSA_BACKEND=reference"):
        resolve_backend(tensor, "kernel")


def test_the_head_dim_of_values_has_the_same_limit(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="take head dims up to 256, got 257"):
        resolve_backend(CPU, "kernel", 257)


def test_without_triton_the_kernels_are_refused(monkeypatch):
    monkeypatch.setattr("nsa.ops.backend.launch", None)
    with pytest.raises(ValueError, match="need Triton, which is not installed"):
        resolve_backend(CPU, "kernel")


def test_both_implementations_hold_the_same_functions():
    names = set(implementation("kernel").__all__)
    assert names <= set(implementation("reference").__all__)
    assert len(names) > 10


def test_an_empty_variable_is_unset(monkeypatch):
    monkeypatch.setenv("NSA_BACKEND", "")
    assert resolve_backend(CPU, None) == "reference"


def test_unknown_names_say_where_they_came_from(monkeypatch):
    with pytest.raises(ValueError, match=r"^backend: expected one of reference, kernel, got 'gpu'"):
        resolve_backend(CPU, "gpu")
    monkeypatch.setenv("NSA_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"^NSA_BACKEND: expected one of .*, got 'triton'"):
        resolve_backend(CPU, None)


def test_the_environment_reaches_the_ops(monkeypatch):
    q = torch.randn(1, 3, 1, 4)
    monkeypatch.setenv("NSA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"^NSA_BACKEND: expected"):
        window_attention(q, q, q, window_size=2)


def test_autocast_does_not_reach_into_the_ops():
    """Products inside an op keep the dtype of its inputs."""
    torch.manual_seed(0)
    q = torch.randn(1, 9, 2, 16)
    expected = window_attention(q, q, q, window_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        found = window_attention(q, q, q, window_size=4)
        assert torch.mm(q[0, :, 0], q[0, :, 0].T).dtype == torch.bfloat16
    assert torch.equal(found, expected)
