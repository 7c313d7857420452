"""The check that comes before every measurement: a wrong answer has no speed.

The oracle is the reference in float64 on the same inputs, at a length that does not divide into
blocks. The bounds are loose enough for any honest kernel of that dtype and far below what one wrong
block, head or mask entry causes. Where terms cancel, as in the gradients of keys that all queries
see alike, no computation in that dtype is within them: twice the error of the reference in that
dtype is then the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nsa import reference
from nsa.bench.operations import OPERATIONS
from nsa.bench.providers import Outputs, Provider
from nsa.bench.shapes import Shape
from nsa.bench.workloads import Tensors, add_selection, make_tensors, present
from nsa.config import NSAConfig
from nsa.ops import window_attention

# Largest relative error of a tensor (root mean square), and of one row against the largest row.
BOUNDS = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}

# Share of rows that must agree where blocks are chosen among many: near-ties flip with rounding.
AGREEMENT = {
    torch.float64: 0.95,
    torch.float32: 0.9,
    torch.float16: 0.5,
    torch.bfloat16: 0.25,
}


class WrongResultError(Exception):
    """A provider's result is not the operation's."""


def check(
    provider: Provider,
    operation: str,
    mode: str,
    shape: Shape,
    workload: str,
    dtype: torch.dtype,
    device: torch.device,
    compressor: str = "mlp",
) -> float:
    """Compares one operation with the oracle.

    Returns:
        The largest relative error found.

    Raises:
        WrongResultError: it is above the bound of the dtype.
    """
    with_grad = mode == "backward"

    def compare(
        length: int, with_grad: bool, rows: int | None = None
    ) -> tuple[Tensors, Outputs, Outputs, Callable[[], Outputs]]:
        tensors = make_tensors(shape, length, workload, dtype, device, compressor)
        tensors = add_selection(tensors, shape.config, provider.backend)
        exact = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        leaves = OPERATIONS[operation].leaves
        run = partial(_run, leaves=leaves, config=shape.config, with_grad=with_grad, rows=rows)
        got = run(provider.operations[operation], tensors=tensors)
        oracle = _oracle(operation)
        return exact, got, run(oracle, tensors=exact), partial(run, oracle, tensors=tensors)

    covered = shape.config.num_selected_blocks * shape.config.block_size
    real_choice = covered * 3 // 2 + 5
    if operation == "select_blocks":
        exact, got, *_ = compare(real_choice, with_grad=False)
        errors = [_selection_error(got[0], exact, shape.config)]
        wrong = _beyond(errors, dtype)
    elif OPERATIONS[operation].selects:
        # Near-ties fall differently in float64, and one other block changes a row entirely. So
        # every number is compared for the queries whose blocks are all chosen, and where there is
        # a choice, only that enough rows agree. A few queries more keep the operation from taking
        # the way of short sequences, which need no choice.
        if operation == "nsa_decode":
            _, got, expected, plain = compare(covered - 3, with_grad)
        else:
            _, got, expected, plain = compare(covered + 5, with_grad, rows=covered)
        errors, wrong = _errors(got, expected, plain, dtype)
        _, got, expected, _ = compare(real_choice, with_grad=False)
        agreement = [_agreement_error(got[0], expected[0], covered, dtype)]
        errors, wrong = errors + agreement, wrong + _beyond(agreement, dtype)
    else:
        _, got, expected, plain = compare(real_choice, with_grad)
        errors, wrong = _errors(got, expected, plain, dtype)
    if wrong:
        raise WrongResultError(
            f"{provider.name} {operation} {mode}: relative error {max(wrong):.1e} against the "
            f"reference in float64, expected at most {BOUNDS[dtype]:.0e} in {dtype}, "
            "or twice the error of the reference in that dtype"
        )
    return max(errors)


def _beyond(errors: list[float], dtype: torch.dtype) -> list[float]:
    """Those above the bound, and those that are no numbers."""
    return [error for error in errors if not error <= BOUNDS[dtype]]


def _errors(
    got: Outputs, expected: Outputs, plain: Callable[[], Outputs], dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    """The relative error of each tensor, and those that are wrong.

    ``plain`` computes the same with the reference in the dtype.
    """
    errors = [_relative_error(*pair) for pair in zip(got, expected, strict=True)]
    if not _beyond(errors, dtype):
        return errors, []
    own = [_relative_error(*pair) for pair in zip(plain(), expected, strict=True)]
    # A reference that overflows excuses nothing.
    excused = [e <= 2 * o < float("inf") for e, o in zip(errors, own, strict=True)]
    left = [error for error, fine in zip(errors, excused, strict=True) if not fine]
    return errors, _beyond(left, dtype)


def _oracle(operation: str):
    """The reference; dense attention is a window that covers everything."""
    run = OPERATIONS[operation].run

    def prepare(tensors: Tensors, config: NSAConfig):
        def call() -> Outputs:
            if run is not None:
                return run(tensors, config, "reference")
            q, k, v = (tensors[name] for name in ("q", "k_slc", "v_slc"))
            o = window_attention(q, k, v, window_size=q.shape[1], backend="reference")
            return (o[:, -1:] if operation == "dense_decode" else o,)

        return call

    return prepare


def _run(
    prepare,
    *,
    leaves: tuple[str, ...],
    tensors: Tensors,
    config: NSAConfig,
    with_grad: bool,
    rows: int | None,
) -> Outputs:
    """Outputs, followed by gradients of the leaves for a fixed gradient of the outputs.

    Of the outputs only the first ``rows``, all if None.
    """
    if with_grad:
        tensors = with_leaves(tensors, leaves)
    outputs = tuple(x[:, :rows] for x in prepare(tensors, config)())
    if not with_grad:
        return outputs
    grads = [output_gradient(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, present(leaves, tensors), grads)
    return *(x.detach() for x in outputs), *gradients


def with_leaves(tensors: Tensors, leaves: tuple[str, ...]) -> Tensors:
    """The same tensors, those named ready to receive gradients."""
    ready = {name: tensors[name].detach().requires_grad_() for name in leaves if name in tensors}
    return {**tensors, **ready}


def output_gradient(output: Tensor) -> Tensor:
    """Normal noise like ``output``, the same for every dtype up to rounding."""
    generator = torch.Generator(output.device).manual_seed(1)
    noise = torch.randn(output.shape, generator=generator, device=output.device)
    return noise.bfloat16().to(output.dtype)


def _relative_error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    difference = (got.double() - expected).flatten(0, -2)
    expected = expected.flatten(0, -2)
    overall = difference.norm() / expected.norm()
    worst_row = difference.norm(dim=-1).max() / expected.norm(dim=-1).max()
    return float(torch.maximum(overall, worst_row))


def _agreement_error(got: Tensor, expected: Tensor, covered: int, dtype: torch.dtype) -> float:
    """Relative error that enough of the rows from position ``covered`` on stay below."""
    first = covered if got.shape[1] > 1 else 0
    got, expected = (x[0, first:].flatten(0, -2).double() for x in (got, expected))
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.sort().values[int(AGREEMENT[dtype] * len(errors))])


def _selection_error(block_indices: Tensor, exact: Tensors, config: NSAConfig) -> float:
    """How much score the chosen blocks miss, relative to the best choice; infinite if malformed."""
    seq_len = block_indices.shape[1]
    scale = exact["q"].shape[-1] ** -0.5
    q, k_cmp = exact["q"], exact["k_cmp"]
    _, lse = reference.compressed_attention_fwd(
        q,
        k_cmp,
        exact["v_cmp"],
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        softmax_scale=scale,
    )
    best = reference.select_blocks(q, k_cmp, lse, config=config, softmax_scale=scale)
    unused, ordered = block_indices < 0, block_indices[..., 1:] > block_indices[..., :-1]
    if not torch.equal(unused, best < 0) or not bool((ordered | unused[..., 1:]).all()):
        return float("inf")
    own = torch.arange(seq_len, device=q.device)[:, None, None] // config.block_size
    chosen = torch.zeros(
        *best.shape[:3], config.num_blocks(seq_len) + 1, dtype=torch.bool, device=q.device
    )
    chosen.scatter_(-1, block_indices.long().masked_fill(unused, chosen.shape[-1] - 1), True)
    blocks = torch.arange(chosen.shape[-1] - 1, device=q.device)
    forced = (blocks < config.num_init_blocks) | (blocks > own - config.num_local_blocks)
    if bool((block_indices > own).any()) or not bool(
        (chosen[..., :-1] | ~forced | (blocks > own)).all()
    ):
        return float("inf")
    scores = reference.block_scores(q, k_cmp, lse, 0, seq_len, config, scale)
    got, most = (
        scores.gather(-1, x.long().clamp(min=0)).masked_fill(x < 0, 0).sum(-1)
        for x in (block_indices, best)
    )
    return float(((most - got) / most.clamp(min=1e-12)).max())
