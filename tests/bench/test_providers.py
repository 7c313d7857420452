import pytest

from nsa.bench.operations import OPERATIONS
from nsa.bench.providers import MAX_MASKED_TOKENS, PROVIDERS

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


def test_dense_masks_are_measured_while_they_fit():
    sdpa = PROVIDERS["sdpa"]
    assert sdpa.offers("window_attention", MAX_MASKED_TOKENS)
    assert not sdpa.offers("window_attention", MAX_MASKED_TOKENS + 1)
    assert sdpa.offers("dense_attention", MAX_MASKED_TOKENS + 1)
    assert not sdpa.offers("compress_kv", 1)
