"""Which code an operation runs: the GPU kernels or the PyTorch reference."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType, new_class
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nsa import reference

try:
    from nsa.ops import launch
except ImportError:  # Triton has no build for this platform.
    launch = None

BACKENDS = ("reference", "kernel")
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
INSTEAD = "Pass backend='reference' (or set NSA_BACKEND=reference) for the PyTorch reference."


def resolve_backend(tensor: Tensor, backend: str | None, value_dim: int = 0) -> str:
    """``backend`` if given, else ``$NSA_BACKEND`` if set, else by device.

    By device means kernels for CUDA tensors and the reference elsewhere. The kernels have a limit
    for head dims: that of ``tensor``, and of values ``value_dim``.

    Raises:
        ValueError: the name is not one of ``BACKENDS``, or the kernels cannot take this tensor.
    """
    source = "backend"
    if backend is None:
        source, backend = "NSA_BACKEND", os.environ.get("NSA_BACKEND") or None
    if backend is None:
        source, backend = "device", "kernel" if tensor.device.type == "cuda" else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "kernel":
        _check_kernels_take(tensor, source, max(tensor.shape[-1], value_dim))
    return backend


def _check_kernels_take(tensor: Tensor, source: str, head_dim: int) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if launch is None:
        raise ValueError(
            f"{source}: the GPU kernels need Triton, which is not installed. {INSTEAD}"
        )
    if tensor.device.type != "cuda" and not interpreted:
        raise ValueError(
            f"{source}: expected CUDA tensors for the GPU kernels, got {tensor.device}. {INSTEAD}"
        )
    if tensor.dtype not in KERNEL_DTYPES:
        raise ValueError(
            "the GPU kernels take bfloat16, float16 and float32 tensors, got "
            f"{str(tensor.dtype).removeprefix('torch.')}. {INSTEAD}"
        )
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"the GPU kernels take head dims up to {MAX_HEAD_DIM}, got {head_dim}. {INSTEAD}"
        )


def implementation(backend: str) -> ModuleType:
    """``nsa.reference`` or ``nsa.ops.launch``, which hold the same functions.

    Compression is of one tensor in the reference, of keys and values together in the launches.
    """
    if backend == "reference":
        return reference
    assert launch is not None, "resolve_backend lets no kernels through without Triton"
    return launch


def custom_op(name: str) -> Callable[[Callable], Any]:
    """``torch.library.custom_op`` of a function without side effects, on its tensors' device.

    Autocast stays on inside of an op and would round the products that are meant to be exact: the
    function runs without it.
    """

    def register(function: Callable) -> Any:
        @functools.wraps(function)
        def run(first: Tensor, *others: object) -> object:
            device = first.device
            if torch.is_autocast_enabled(device.type):
                with torch.autocast(device.type, enabled=False):
                    return run(first, *others)
            # Triton starts kernels on the current device, wherever their arguments are.
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    return function(first, *others)
            return function(first, *others)

        return torch.library.custom_op(name, run, mutates_args=())

    return register


def differentiable(op: Any, setup_context: Callable, backward: Callable) -> Callable[..., Any]:
    """Gives ``op`` its gradient and returns what the public function calls.

    That is the op as a ``torch.autograd.Function`` of its own, since the one of ``torch.library``
    reads the schema again for each argument of each call: that costs the host more than a launch.
    """
    op.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    # Its name is what a profiler and ``grad_fn`` show.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = new_class(op._name, (Function,), exec_body=lambda body: body.update(members))

    def run(*inputs: Any) -> Any:
        # A graph that is being traced holds the op itself.
        plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        return op(*inputs) if plain else function.apply(*inputs)

    return run
