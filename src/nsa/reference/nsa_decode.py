"""The last tokens of each sequence against its cached keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.reference.nsa_attention import nsa_attention_fwd


def nsa_decode(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    *,
    seq_lens: Tensor,
    config: NSAConfig,
    softmax_scale: float,
) -> Tensor:
    """See ``nsa.ops.nsa_decode``. Sequences of equal length are computed together."""
    num_queries = q.shape[1]
    out = torch.zeros(*q.shape[:3], v_slc.shape[-1], dtype=q.dtype, device=q.device)
    for length in torch.unique(seq_lens).tolist():
        rows = (seq_lens == length).nonzero()[:, 0]
        blocks = config.num_compressed(length)
        out[rows] = nsa_attention_fwd(
            q[rows],
            k_cmp[rows, :blocks],
            v_cmp[rows, :blocks],
            k_slc[rows, :length],
            v_slc[rows, :length],
            k_win[rows, :length],
            v_win[rows, :length],
            gates[rows],
            config=config,
            softmax_scale=softmax_scale,
            q_offset=length - num_queries,
            save=False,
        )[0]
    return out
