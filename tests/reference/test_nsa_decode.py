"""Decoding with a cache: rows of prefill, whatever lies past each sequence's end."""

import pytest
import torch
from tests.cases import NSA_INPUTS, SMALL, WIDE, Case

from nsa import reference


@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "equal-block-sizes"])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_equals_rows_of_prefill(config, num_queries):
    """Three lengths at once, one twice, from a cache whose unused entries are NaN."""
    lengths = [29, 4, 29, 17]
    case = Case(name="", lengths=(29,) * 4, config=config, dtype=torch.float64, dv=3)
    tensors = case.tensors()
    rows, expected = {name: [] for name in ("q", "gates")}, []
    cached = {name: x.clone() for name, x in tensors.items()}
    for b, length in enumerate(lengths):
        blocks = config.num_compressed(length)
        one = {name: x[b : b + 1, :length] for name, x in tensors.items()}
        one |= {name: tensors[name][b : b + 1, :blocks] for name in ("k_cmp", "v_cmp")}
        whole = reference.nsa_attention_fwd(
            *[one[name] for name in NSA_INPUTS], config=config, softmax_scale=0.7
        )[0]
        expected.append(whole[0, length - num_queries :])
        for name in rows:
            rows[name].append(tensors[name][b, length - num_queries : length])
        for name in ("k_slc", "v_slc", "k_win", "v_win"):
            cached[name][b, length:] = torch.nan
        for name in ("k_cmp", "v_cmp"):
            cached[name][b, blocks:] = torch.nan
    cached |= {name: torch.stack(parts) for name, parts in rows.items()}
    found = reference.nsa_decode(
        *[cached[name] for name in NSA_INPUTS],
        seq_lens=torch.tensor(lengths),
        config=config,
        softmax_scale=0.7,
    )
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
