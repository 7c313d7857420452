"""The bound accepts what the dtype explains and rejects everything else."""

import pytest
import torch
from tests.tolerance import assert_close_to_oracle

ORACLE = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def test_accepts_twice_the_error_of_the_same_dtype_reference():
    assert_close_to_oracle((ORACLE + 2e-3).float(), ORACLE, (ORACLE - 1e-3).float())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        pytest.param((ORACLE + 3e-3).float(), "grad: error 3.0", id="error-too-large"),
        pytest.param(ORACLE.float()[:2], "shape", id="shape"),
        pytest.param(torch.tensor([1.0, torch.nan, 3.0]), "not finite", id="nan"),
        pytest.param(torch.tensor([1.0, -torch.inf, 3.0]), "not finite", id="infinity"),
    ],
)
def test_rejects(out, message):
    with pytest.raises(AssertionError, match=message):
        assert_close_to_oracle(out, ORACLE, (ORACLE - 1e-3).float(), name="grad")


def test_infinities_must_agree_in_sign():
    oracle = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    assert_close_to_oracle(oracle.float(), oracle, oracle.float())
    with pytest.raises(AssertionError, match="another infinity"):
        assert_close_to_oracle(-oracle.float(), oracle * torch.tensor([1, -1]), oracle.float())


def test_a_reference_that_is_not_finite_proves_nothing():
    with pytest.raises(AssertionError, match="same-dtype reference is not finite"):
        assert_close_to_oracle(ORACLE.float(), ORACLE, torch.full((3,), torch.nan))


def test_rounding_scales_with_the_terms_that_cancel():
    zero = torch.zeros(3, dtype=torch.float64)
    noise = torch.full((3,), 1e-4)
    assert_close_to_oracle(noise, zero, zero.float(), magnitude=1e3)
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_oracle(noise, zero, zero.float(), magnitude=1.0)
