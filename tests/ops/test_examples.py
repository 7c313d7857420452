"""The examples in the docstrings run and print what they say."""

import doctest

import pytest
import torch

from nsa import ops
from nsa.config import NSAConfig

PUBLIC = {name: getattr(ops, name) for name in ops.__all__} | {"NSAConfig": NSAConfig}
# Weights have no use alone; decoding needs a cache, which its own test builds.
WITHOUT = {"CompressorWeights", "nsa_decode"}


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - WITHOUT))
def test_example(name):
    found = doctest.DocTestFinder(recurse=False).find(
        PUBLIC[name], name, globs=dict(PUBLIC, torch=torch)
    )
    assert sum(len(test.examples) for test in found) > 0
    for test in found:
        result = doctest.DocTestRunner().run(test)
        assert result.failed == 0
