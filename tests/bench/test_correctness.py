"""Right providers pass, and each kind of mistake is caught."""

from dataclasses import replace

import pytest
import torch

from nsa.bench import correctness
from nsa.bench.correctness import WrongResultError, check
from nsa.bench.operations import OPERATIONS
from nsa.bench.providers import PROVIDERS
from nsa.bench.shapes import SHAPES
from nsa.bench.workloads import make_tensors

TINY = SHAPES["tiny"]
CPU = torch.device("cpu")
REFERENCE, SDPA = PROVIDERS["reference"], PROVIDERS["sdpa"]

ALL = [
    pytest.param(provider, operation, mode, id=f"{provider.name}-{operation}-{mode}")
    for provider in (REFERENCE, SDPA)
    for operation in provider.operations
    for mode in OPERATIONS[operation].modes
]


@pytest.mark.parametrize(("provider", "operation", "mode"), ALL)
def test_providers_on_the_cpu_are_right(provider, operation, mode):
    error = check(provider, operation, mode, TINY, "random", torch.float32, CPU)
    assert 0 <= error < 1e-5


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_means_are_checked_as_means(mode):
    error = check(REFERENCE, "pipeline", mode, TINY, "local", torch.float32, CPU, "mean")
    assert 0 <= error < 1e-5


def broken(operation, change):
    """The reference with one operation's outputs changed."""
    right = REFERENCE.operations[operation]

    def prepare(tensors, config):
        call = right(tensors, config)
        return lambda: tuple(change(x) for x in call())

    return replace(REFERENCE, operations={operation: prepare})


def with_geometry(operation, **changes):
    """The reference that computes with another geometry than it was asked for."""
    right = REFERENCE.operations[operation]

    def prepare(tensors, config):
        return right(tensors, replace(config, **changes))

    return replace(REFERENCE, operations={operation: prepare})


MISTAKES = [
    pytest.param(
        "window_attention", with_geometry("window_attention", window_size=65), id="window"
    ),
    pytest.param(
        "window_attention", broken("window_attention", lambda x: x.roll(1, 1)), id="shifted"
    ),
    pytest.param("window_attention", broken("window_attention", lambda x: x * 1.001), id="scaled"),
    pytest.param("window_attention", broken("window_attention", lambda x: x * torch.nan), id="nan"),
    pytest.param("window_attention", broken("window_attention", lambda x: x[:, 1:]), id="shape"),
    pytest.param("select_blocks", with_geometry("select_blocks", num_local_blocks=0), id="local"),
    pytest.param("select_blocks", with_geometry("select_blocks", num_init_blocks=0), id="init"),
    pytest.param("select_blocks", broken("select_blocks", lambda x: x.flip(-1)), id="order"),
    pytest.param("select_blocks", broken("select_blocks", lambda x: x + (x > 5)), id="future"),
    pytest.param("select_blocks", broken("select_blocks", lambda x: x.roll(-16, 1)), id="scores"),
    pytest.param("pipeline", with_geometry("pipeline", block_size=32), id="block-size"),
    pytest.param("pipeline", with_geometry("pipeline", num_selected_blocks=7), id="one-block-less"),
    pytest.param("nsa_attention", with_geometry("nsa_attention", num_init_blocks=2), id="choice"),
]


@pytest.mark.parametrize(("operation", "provider"), MISTAKES)
def test_mistakes_are_caught(operation, provider):
    with pytest.raises(WrongResultError, match=f"reference {operation} forward: relative error"):
        check(provider, operation, "forward", TINY, "random", torch.float32, CPU)


class Scaled(torch.autograd.Function):
    """The same tensor, whose gradient is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def test_a_wrong_gradient_alone_is_caught():
    provider = broken("selected_attention", lambda x: Scaled.apply(x, 0.99))
    assert (
        check(provider, "selected_attention", "forward", TINY, "local", torch.float32, CPU) < 1e-5
    )
    with pytest.raises(WrongResultError, match="selected_attention backward"):
        check(provider, "selected_attention", "backward", TINY, "local", torch.float32, CPU)


def test_where_terms_cancel_the_reference_of_the_dtype_is_the_bound(monkeypatch):
    """Values much alike leave gradients of queries and keys that bfloat16 does not resolve."""

    def alike(*args):
        tensors = make_tensors(*args)
        return {**tensors, "v_win": tensors["v_win"] + 30}

    monkeypatch.setattr(correctness, "make_tensors", alike)
    what = ("window_attention", "backward", TINY, "random", torch.bfloat16, CPU)
    assert check(REFERENCE, *what) > 2 * correctness.BOUNDS[torch.bfloat16]
    far_off = broken("window_attention", lambda x: x + x.detach() * 0.1)
    with pytest.raises(WrongResultError):
        check(far_off, *what)

    def without_gradient(tensors, config):
        """Right but for the gradient of the queries, which is one of those that do not resolve."""
        blocked = {**tensors, "q": Scaled.apply(tensors["q"], 0.0)}
        return REFERENCE.operations["window_attention"](blocked, config)

    with pytest.raises(WrongResultError):
        check(replace(REFERENCE, operations={"window_attention": without_gradient}), *what)


def test_a_reference_that_overflows_excuses_nothing():
    one = torch.ones(2, 2, dtype=torch.float64)
    nowhere = torch.full((2, 2), torch.inf)
    for got in (one * 5, nowhere):
        errors, wrong = correctness._errors((got,), (one,), lambda: (nowhere,), torch.float16)
        assert errors == wrong, got
