"""Which code an operation runs: the GPU kernels or the PyTorch reference."""

from __future__ import annotations

import os

from torch import Tensor

BACKENDS = ("reference", "kernel")


def resolve_backend(tensor: Tensor, backend: str | None) -> str:
    """``backend`` if given, else ``$NSA_BACKEND`` if set, else by device.

    By device means kernels for CUDA tensors and the reference elsewhere.

    Raises:
        ValueError: the name is not one of ``BACKENDS``.
    """
    source = "backend"
    if backend is None:
        source, backend = "NSA_BACKEND", os.environ.get("NSA_BACKEND") or None
    if backend is None:
        return "kernel" if tensor.device.type == "cuda" else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    return backend


def no_kernel(operation: str) -> NotImplementedError:
    """The error of an operation that has no kernel for what was asked."""
    return NotImplementedError(
        f"{operation}: there is no GPU kernel for it yet. Pass backend='reference' (or set "
        "NSA_BACKEND=reference) to run the PyTorch reference, which works on any device."
    )
