"""The one error bound of the tests, for outputs, log-sum-exps and gradients, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Sums of a few hundred terms taken in another order differ by this many units in the last place of
# the largest result, even where the same-dtype reference happens to be exact.
ROUNDING_UNITS = 16


def assert_close_to_oracle(
    out: Tensor,
    oracle: Tensor,
    same_dtype_reference: Tensor,
    *,
    name: str = "output",
    magnitude: float = 0.0,
) -> None:
    """``max|out - oracle| <= 2 max|same_dtype_reference - oracle| + rounding``.

    Args:
        out: what is tested, any float dtype.
        oracle: the truth, float64, same shape.
        same_dtype_reference: a plain computation in out's dtype, which shows what the dtype allows.
        name: what the message calls it.
        magnitude: size of the terms that were summed, where they may cancel (gradients of a
            saturated softmax are 0, but not the terms they are the difference of). Rounding is that
            of this or of the largest result.

    Raises:
        AssertionError: shapes differ, values that are not finite differ, or the error is too large.
    """
    assert oracle.dtype == torch.float64, f"{name}: the oracle is {oracle.dtype}, not float64"
    assert out.shape == oracle.shape, f"{name}: shape {list(out.shape)}, not {list(oracle.shape)}"
    assert same_dtype_reference.shape == oracle.shape, f"{name}: the reference has another shape"
    found, truth, same = (
        x.detach().to(oracle.device, torch.float64) for x in (out, oracle, same_dtype_reference)
    )
    special = ~truth.isfinite()
    assert torch.equal(special, ~found.isfinite()), f"{name}: not finite where the oracle is"
    assert torch.equal(truth[special], found[special]), f"{name}: another infinity than the oracle"
    truth, found, same = truth[~special], found[~special], same[~special]
    if truth.numel() == 0:
        return
    error = (found - truth).abs().max().item()
    rounding = torch.finfo(out.dtype).eps * max(magnitude, truth.abs().max().item())
    allowed = 2 * (same - truth).abs().max().item() + ROUNDING_UNITS * rounding
    assert math.isfinite(allowed), f"{name}: the same-dtype reference is not finite"
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
