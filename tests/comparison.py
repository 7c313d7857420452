"""Values and gradients of a function, and the comparison of them with those of the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from tests.tolerance import assert_close_to_oracle
from torch import Tensor


def values_and_gradients(
    function: Callable, tensors: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Outputs ``out0, ..`` of ``function(*tensors)``, gradients ``dq, ..`` of a random sum."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    outputs = function(*leaves.values())
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    generator = torch.Generator().manual_seed(seed + 1)
    pairs = []
    for x in outputs:
        cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if x.requires_grad:
            pairs.append((x, cotangent.to(x.device, x.dtype)))
    gradients = [None] * len(leaves)
    if pairs:
        gradients = torch.autograd.grad(
            [x for x, _ in pairs], list(leaves.values()), [y for _, y in pairs], allow_unused=True
        )
    found = {f"out{i}": x.detach() for i, x in enumerate(outputs)}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def compare(
    function: Callable,
    truth: Callable,
    tensors: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Holds values and gradients of ``function`` against those of the oracle ``truth``.

    Args:
        function: what is tested, called with ``tensors`` in ``dtype`` on ``device``.
        truth: the oracle, called in float64 and, for the size of the bound, in ``dtype``.
        tensors: float64 inputs.
        dtype: dtype of the test.
        seed: of the random weights of the outputs.
        device: where ``function`` runs.

    Returns:
        What ``function`` gave, as ``values_and_gradients`` names it.
    """
    narrow = {name: x.to(device, dtype) for name, x in tensors.items()}
    found = values_and_gradients(function, narrow, seed)
    check_close(found, truth, tensors, dtype=dtype, seed=seed)
    for name in tensors:
        assert found[f"d{name}"].dtype == dtype, f"d{name} is {found[f'd{name}'].dtype}"
    assert found["out0"].dtype == dtype, f"output is {found['out0'].dtype}"
    return found


def check_close(
    found: dict[str, Tensor],
    truth: Callable,
    tensors: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Holds what ``values_and_gradients`` found against the oracle; see ``compare``."""
    num_outputs = sum(name.startswith("out") for name in found)

    def truth_of_outputs(*values: Tensor):
        outputs = truth(*values)
        return outputs if isinstance(outputs, Tensor) else outputs[:num_outputs]

    wide = values_and_gradients(truth_of_outputs, tensors, seed)
    narrow = {name: x.to(dtype) for name, x in tensors.items()}
    same = values_and_gradients(truth_of_outputs, narrow, seed)
    for name, out in found.items():
        assert_close_to_oracle(
            out, wide[name], same[name], name=name, magnitude=_magnitude(name, tensors)
        )


def _magnitude(name: str, tensors: dict[str, Tensor]) -> float:
    """Size of the terms in a gradient: those of dq are products of keys and values, and so on."""

    def largest(letter: str) -> float:
        sizes = [x.abs().max().item() for n, x in tensors.items() if n[0] == letter and x.numel()]
        return max(sizes, default=0.0)

    factors = {"dq": "kv", "dk": "qv", "dg": "v"}.get(name[:2])
    if factors is None or "q" not in tensors:
        return 0.0
    return math.prod(largest(letter) for letter in factors)
