import pytest

from nsa.bench.results import is_grouped
from nsa.bench.shapes import SHAPES
from nsa.config import NSAConfig

SMALL = (1, 2, 4)
ALL = (*SMALL, 8)
FAMILIES = (("", ALL), ("wide-", SMALL), ("narrow-", SMALL), ("broad-", ALL), ("odd-", (8,)))


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_layer_that_could_be_built(name):
    shape = SHAPES[name]
    assert shape.name == name
    assert shape.num_heads % shape.num_kv_heads == 0
    assert min(shape.seq_lens) >= shape.config.compress_block_size


def test_the_paper_shape_is_the_papers():
    shape = SHAPES["paper"]
    heads = (shape.num_heads, shape.num_kv_heads, shape.key_dim, shape.value_dim)
    assert heads == (64, 4, 192, 128)
    assert shape.config == NSAConfig.paper()
    assert 65536 in shape.seq_lens


def test_groups_share_the_query_heads():
    for widths, sizes in FAMILIES:
        for size in sizes:
            shape = SHAPES[f"{widths}group-{size}"]
            assert (shape.num_heads, shape.num_heads // shape.num_kv_heads) == (32, size)
        for size in (12, 24, 48):
            shape = SHAPES[f"{widths}padded-group-{size}"]
            assert shape.num_heads // shape.num_kv_heads == size


def test_all_points_of_a_curve_over_groups_differ_in_heads_only():
    """Of the README's tables and picture, which take rows by the name of their shape."""
    grouped = [shape for shape in SHAPES.values() if is_grouped({"shape": shape.name})]
    widths = {(shape.key_dim, shape.value_dim) for shape in grouped}
    points = {(s.key_dim, s.num_heads // s.num_kv_heads) for s in grouped}
    assert len(points) == len(grouped) == 30
    alike = {(s.key_dim, s.value_dim, s.seq_lens, s.config) for s in grouped}
    assert len(alike) == len(widths) == 5


def test_the_longest_shape_has_a_million_tokens():
    assert SHAPES["million"].seq_lens == (2**20,)
