"""NSA of flash-linear-attention (``pip install fla-core``), where it is installed.

It compresses by means of whole selection blocks and has one pair of keys and values for all
branches: that is ``shared_pipeline`` of this package.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from nsa.bench.workloads import Tensors
from nsa.config import NSAConfig

AVAILABLE = importlib.util.find_spec("fla") is not None


def shared_pipeline(tensors: Tensors, config: NSAConfig) -> Callable[[], tuple[Tensor, ...]]:
    """``fla.ops.nsa.parallel_nsa``, with the window branch by PyTorch's FlashAttention-2.

    fla takes that branch from the package flash-attn, the same kernel, and adds it just so.

    Raises:
        ImportError: fla is not installed.
        NotImplementedError: sizes that it does not support.
    """
    try:
        parallel_nsa = importlib.import_module("fla.ops.nsa").parallel_nsa
    except ImportError as error:
        raise ImportError('The provider "fla" needs: pip install fla-core einops') from error
    q, k, v = (tensors[name] for name in ("q", "k_slc", "v_slc"))
    group = q.shape[2] // k.shape[2]
    if group < 16 or group & (group - 1):
        raise NotImplementedError(
            f"fla takes groups of a power of two of at least 16 heads, got {group}."
        )
    if (config.num_init_blocks, config.num_local_blocks) != (1, 2):
        raise NotImplementedError(
            "fla always takes the first and the last two blocks, the geometry asks for "
            f"{config.num_init_blocks} and {config.num_local_blocks}."
        )
    if k.shape[-1] != v.shape[-1]:
        raise NotImplementedError("FlashAttention-2 takes keys and values of one width.")

    def call() -> tuple[Tensor, ...]:
        g_cmp, g_slc, g_win = tensors["gates"].unbind(-1)
        o = parallel_nsa(
            q,
            k,
            v,
            g_cmp=g_cmp,
            g_slc=g_slc,
            block_counts=config.num_selected_blocks,
            block_size=config.block_size,
        )
        return (torch.addcmul(o, window(q, k, v, config.window_size), g_win.unsqueeze(-1)),)

    return call


def window(q: Tensor, k: Tensor, v: Tensor, window_size: int) -> Tensor:
    """FlashAttention-2 over the last ``window_size`` keys, own included."""
    seq_len = q.shape[1]
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        None,
        None,
        seq_len,
        seq_len,
        0.0,
        True,
        False,
        window_size_left=window_size - 1,
        window_size_right=0,
    )[0]
