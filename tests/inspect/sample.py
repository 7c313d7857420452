"""A measured layer and a small page for the tests of this folder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nsa import reference
from nsa.config import NSAConfig
from nsa.inspect import LayerTrace, Trace, measure_layer

CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, block_size=8, num_selected_blocks=4, window_size=12
)
SCALE = 16**-0.5


def tensors(num_tokens: int, *, seed: int = 0) -> dict[str, Tensor]:
    """q, k_cmp, k_slc and gates of 4 heads and 2 kv heads."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, num_tokens, 4, 16, generator=generator)
    k = torch.randn(1, num_tokens, 2, 16, generator=generator)
    k_cmp = reference.compress_fwd(
        k, None, None, None, kind="mean", compress_block_size=8, compress_stride=4
    )
    gates = torch.rand(1, num_tokens, 4, 3, generator=generator)
    return {"q": q, "k_cmp": k_cmp, "k_slc": k, "gates": gates}


def layer(num_tokens: int, *, seed: int = 0, twin: bool = False) -> LayerTrace:
    given = tensors(num_tokens, seed=seed)
    other = (given["q"].flip(1), given["k_slc"], SCALE) if twin else None
    return measure_layer(**given, config=CONFIG, softmax_scale=SCALE, twin=other)


def sample_trace(num_tokens: int = 150, *, num_layers: int = 2, twin: bool = True) -> Trace:
    layers = {i: layer(num_tokens, seed=i, twin=twin) for i in range(num_layers)}
    return Trace(input_ids=np.arange(num_tokens), geometry=CONFIG, layers=layers)


def sample_pieces(num_tokens: int = 150) -> list[str]:
    """Words that would break a page which does not escape them."""
    odd = ["</script>", "<b>", "&amp;", "\n", " é", "{meta}", '"quoted"', "漢"]
    return [odd[i % len(odd)] if i % 5 == 0 else f" word{i}" for i in range(num_tokens)]
