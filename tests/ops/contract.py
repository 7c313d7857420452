"""What PyTorch asks of every operation: schema, fakes, autograd and whole-graph tracing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.cases import SMALL, Case
from tests.comparison import values_and_gradients
from torch import Tensor

# Float32 tensors of small shapes; the layouts differ in strides, which fakes must predict.
CASES = [
    Case(name="batch", lengths=(11, 11), dv=3),
    Case(name="empty", lengths=(0,)),
    Case(name="offset", lengths=(3,), offset=9),
    Case(name="packed", lengths=(7, 0, 9), packed=True),
]
# Every query sees a compressed block, so lse is finite and its gradient can be probed numerically.
SEEING = Case(
    name="seeing",
    lengths=(6,),
    offset=SMALL.compress_block_size,
    group=2,
    kv_heads=1,
    dk=2,
    dv=3,
    dtype=torch.float64,
)
GRADCHECK = [SEEING, Case(name="packed", lengths=(5, 0, 7), packed=True, dk=2, dv=3, kv_heads=1)]


def heads_first(x: Tensor) -> Tensor:
    """The same values with heads outside tokens in memory, as projections often leave them."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


LAYOUTS = {"contiguous": lambda x: x, "heads-first": heads_first}


def check_forward(operation: Callable, *args: object) -> None:
    """``opcheck`` with gradients asked of every float tensor."""

    def leaf(x: object) -> object:
        is_float = isinstance(x, Tensor) and x.is_floating_point()
        return x.detach().requires_grad_() if is_float else x

    torch.library.opcheck(operation, [leaf(x) for x in args])


def check_backward(operation: Callable, *args: object) -> None:
    """``opcheck`` of an op that has no gradient itself."""
    torch.library.opcheck(operation, args)


def check_gradients(function: Callable, *tensors: Tensor) -> None:
    """``gradcheck`` of every tensor, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0)


def check_compiled(
    function: Callable, tensors: dict[str, Tensor], *, backend: str = "aot_eager"
) -> None:
    """One graph, with the values and gradients of the eager function to the last few bits."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected = values_and_gradients(function, tensors, seed=0)
    found = values_and_gradients(compiled, tensors, seed=0)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=4e-6, atol=4e-6)
