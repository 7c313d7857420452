"""What every test runs under: poisoned memory and reproducible property tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# cuBLAS reads this once, before its first call; deterministic mode needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# So does OpenMP this. Processes side by side share the cores (`pytest -n`): with a thread for every
# core in each of them, the oracle's small operations take twice as long on two cores, and many
# times as long on 32. The process that starts them loads this too, and must not say it for them.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))

import torch
from hypothesis import HealthCheck, settings

# Reproducible everywhere by default; `pytest --hypothesis-profile=explore` draws new cases.
_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("reproducible", derandomize=True, **_COMMON)
settings.register_profile("explore", derandomize=False, **_COMMON)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills what ``torch.empty`` returns with NaN (integers: the largest value).

    An operation that reads memory it never wrote then gives NaN instead of a lucky zero.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _returned_memory() -> Iterator[None]:
    """Gives a GPU's memory back after each test: other processes may be testing on it."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
