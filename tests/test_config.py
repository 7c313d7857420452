"""Every constraint of the geometry, and the integers derived from it."""

import dataclasses
import subprocess
import sys

import pytest

from nsa import config as config_module
from nsa.config import NSAConfig

FIELDS = [field.name for field in dataclasses.fields(NSAConfig)]
COUNTS = ["num_init_blocks", "num_local_blocks"]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [True, 16.0, "16", None], ids=repr)
def test_only_ints(name, value):
    with pytest.raises(
        ValueError, match=rf"^{name}: expected an int, got .*{type(value).__name__}"
    ):
        NSAConfig(**{name: value})


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in COUNTS])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_are_positive(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected at least 1, got {value}"):
        NSAConfig(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
def test_forced_counts_may_be_zero_but_not_negative(name):
    assert getattr(NSAConfig(**{name: 0}), name) == 0
    with pytest.raises(ValueError, match=f"^{name}: expected at least 0, got -1"):
        NSAConfig(**{name: -1})


def test_compressed_block_fits_in_a_selection_block():
    with pytest.raises(
        ValueError,
        match=r"^compress_block_size: expected at most block_size = 64 .*got 128",
    ):
        NSAConfig(compress_block_size=128)


def test_stride_divides_the_compressed_block():
    with pytest.raises(
        ValueError,
        match=r"^compress_block_size: expected a multiple of .* = 16 .*got 24",
    ):
        NSAConfig(compress_block_size=24)


def test_stride_divides_the_selection_block():
    with pytest.raises(
        ValueError, match=r"^block_size: expected a multiple of compress_stride = 16 .*got 72"
    ):
        NSAConfig(block_size=72)


def test_forced_blocks_are_counted():
    assert NSAConfig(num_selected_blocks=3).num_selected_blocks == 3
    with pytest.raises(ValueError, match=r"^num_selected_blocks: expected at least .*= 3.*got 2"):
        NSAConfig(num_selected_blocks=2)


def test_unknown_names_are_errors():
    with pytest.raises(TypeError, match="kernel_size"):
        NSAConfig(kernel_size=32)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NSAConfig().window_size = 1


def test_paper_preset():
    """Section 4.1: l = 32, d = 16, l' = 64, n = 16 with 1 initial and 2 local blocks, w = 512."""
    assert dataclasses.astuple(NSAConfig.paper()) == (32, 16, 64, 16, 1, 2, 512)


def test_tiny_preset_selects_part_of_a_thousand_tokens():
    tiny = NSAConfig.tiny()
    assert tiny.num_selected_blocks * tiny.block_size < 1024
    assert tiny.window_size < 1024


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0), (1, 0), (31, 0), (32, 1), (33, 1), (47, 1), (48, 2), (64, 3), (1000, 61)],
)
def test_num_compressed(tokens, expected):
    assert NSAConfig().num_compressed(tokens) == expected
    starts = [s for s in range(0, tokens, 16) if s + 32 <= tokens]
    assert len(starts) == expected


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 1), (64, 1), (65, 2), (1000, 16)])
def test_num_blocks(tokens, expected):
    assert NSAConfig().num_blocks(tokens) == expected


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [
        pytest.param((32, 16, 64), (1, 2, 2, 2, 1), id="paper"),
        pytest.param((16, 16, 64), (1, 1, 1, 1), id="disjoint"),
        pytest.param((16, 16, 16), (1,), id="one-to-one"),
        pytest.param((64, 16, 64), (1, 2, 3, 4, 3, 2, 1), id="equal-blocks"),
    ],
)
def test_importance_weights(geometry, expected):
    size, stride, block = geometry
    config = NSAConfig(compress_block_size=size, compress_stride=stride, block_size=block)
    assert config.importance_weights() == expected


def test_importance_weight_is_the_overlap_in_strides():
    """Entry i: stride-long pieces that compressed block 4j + i - 1 shares with block j."""
    config, j = NSAConfig(), 5
    for i, weight in enumerate(config.importance_weights()):
        start = (4 * j + i - 1) * config.compress_stride
        covered = range(start, start + config.compress_block_size)
        shared = set(covered) & set(range(j * config.block_size, (j + 1) * config.block_size))
        assert weight == len(shared) / config.compress_stride


def test_the_file_needs_the_standard_library_only():
    code = f"import runpy, sys; runpy.run_path({config_module.__file__!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers", "nsa"} & set(done.stdout.split())
