import pytest

from nsa.bench.shapes import SHAPES
from nsa.config import NSAConfig


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
    assert max(shape.seq_lens) == 65536
