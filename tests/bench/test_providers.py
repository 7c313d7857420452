import pytest
import torch

from nsa.bench.operations import OPERATIONS
from nsa.bench.providers import MAX_MASKED_TOKENS, PROVIDERS
from nsa.bench.shapes import SHAPES

ON_CPU = [
    pytest.param(name, operation, id=f"{name}-{operation}")
    for name, provider in PROVIDERS.items()
    if "cpu" in provider.devices
    for operation in provider.operations
]


def test_names_are_those_of_the_registry():
    for name, provider in PROVIDERS.items():
        assert provider.name == name
        assert set(provider.operations) <= set(OPERATIONS)


def test_every_operation_has_a_provider_on_the_cpu():
    assert {case.values[1] for case in ON_CPU} == set(OPERATIONS)


def test_a_dense_mask_that_would_not_fit_is_refused():
    tensors = {"q": torch.empty(1, MAX_MASKED_TOKENS + 1, 1, 1)}
    with pytest.raises(NotImplementedError, match="a dense mask is built up to 8192 tokens only"):
        PROVIDERS["sdpa"].operations["window_attention"](tensors, SHAPES["tiny"].config)
