"""The operations that are measured: what each reads, what gets a gradient, and how to call it.

``pipeline`` is everything between the projections of a layer: compression and ``nsa_attention``.
Rotating the compressed keys is left out but for traces; it is one elementwise pass over a sixteenth
of the keys. ``recompute_pipeline`` is the same, but its backward computes the branch outputs again.
``shared_pipeline`` is a smaller thing that other implementations offer too: one pair of keys and
values for all branches, and blocks of ``block_size`` tokens compressed by their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nsa.bench.workloads import (
    COMPRESSORS,
    WEIGHTS,
    Tensors,
    run_compress,
    without_weights,
)
from nsa.config import NSAConfig
from nsa.ops import (
    compressed_attention,
    nsa_attention,
    nsa_decode,
    select_blocks,
    selected_attention,
    window_attention,
)

MODES = ("forward", "backward")

Run = Callable[[Tensors, NSAConfig, str], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One operation of the package, or what it is compared with.

    Args:
        reads: names of the tensors it takes, see ``nsa.bench.workloads``.
        leaves: those of them that get a gradient; none if there is no backward. Weights are there
            only for compressors that have them.
        selects: whether its output depends on a choice of blocks that it makes itself.
        compressors: kinds of compressor it is measured with; None where that makes no difference.
        view: what the inputs and the geometry become before it runs.
        by_default: whether a plan that names no operations measures it.
        run: calls the package's operation with a backend; None for operations that only others
            provide.
    """

    reads: tuple[str, ...]
    leaves: tuple[str, ...] = ()
    selects: bool = False
    compressors: tuple[str | None, ...] = (None,)
    view: Callable[[Tensors, NSAConfig], tuple[Tensors, NSAConfig]] = lambda x, config: (x, config)
    by_default: bool = True
    run: Run | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """``forward``, and ``backward`` if there is one."""
        return MODES if self.leaves else MODES[:1]


def _compressed(x: Tensors, config: NSAConfig, backend: str) -> tuple[Tensor, ...]:
    o, _ = compressed_attention(
        x["q"],
        x["k_cmp"],
        x["v_cmp"],
        compress_block_size=config.compress_block_size,
        compress_stride=config.compress_stride,
        backend=backend,
    )
    return (o,)


def _select(x: Tensors, config: NSAConfig, backend: str) -> tuple[Tensor, ...]:
    return (select_blocks(x["q"], x["k_cmp"], x["lse"], config=config, backend=backend),)


def _selected(x: Tensors, config: NSAConfig, backend: str) -> tuple[Tensor, ...]:
    blocks, size = x["block_indices"], config.block_size
    o = selected_attention(x["q"], x["k_slc"], x["v_slc"], blocks, block_size=size, backend=backend)
    return (o,)


def _window(x: Tensors, config: NSAConfig, backend: str) -> tuple[Tensor, ...]:
    size = config.window_size
    return (window_attention(x["q"], x["k_win"], x["v_win"], window_size=size, backend=backend),)


def _nsa(
    x: Tensors, config: NSAConfig, backend: str, *, recompute: bool = False
) -> tuple[Tensor, ...]:
    tensors = [x[name] for name in NSA_READS]
    return (nsa_attention(*tensors, config=config, recompute=recompute, backend=backend),)


def _pipeline(
    x: Tensors, config: NSAConfig, backend: str, *, recompute: bool = False
) -> tuple[Tensor, ...]:
    k_cmp, v_cmp = run_compress(x, config, backend)
    return _nsa({**x, "k_cmp": k_cmp, "v_cmp": v_cmp}, config, backend, recompute=recompute)


def share(x: Tensors, config: NSAConfig) -> tuple[Tensors, NSAConfig]:
    """One pair of keys and values for all branches; whole blocks compressed by their mean."""
    shared = {f"{side}_{branch}": x[f"{side}_slc"] for side in "kv" for branch in ("tokens", "win")}
    size = config.block_size
    return (
        {**without_weights(x), **shared},
        replace(config, compress_block_size=size, compress_stride=size),
    )


def _shared_pipeline(x: Tensors, config: NSAConfig, backend: str) -> tuple[Tensor, ...]:
    return _pipeline(*share(x, config), backend)


def _decode(x: Tensors, config: NSAConfig, _backend: str) -> tuple[Tensor, ...]:
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (x[name] for name in NSA_READS)
    seq_lens = torch.tensor([q.shape[1]], device=q.device)
    q, gates = q[:, -1:], gates[:, -1:]
    o = nsa_decode(
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, seq_lens=seq_lens, config=config
    )
    return (o,)


BRANCHES = ("k_slc", "v_slc", "k_win", "v_win")
COMPRESS_READS = (
    "k_tokens",
    "v_tokens",
    *(f"{weight}_{side}" for side in ("k", "v") for weight in WEIGHTS),
)
NSA_READS = ("q", "k_cmp", "v_cmp", *BRANCHES, "gates")
PIPELINE_READS = ("q", *COMPRESS_READS, *BRANCHES, "gates")
SHARED_READS = ("q", "k_slc", "v_slc", "gates")

OPERATIONS = {
    "compress_kv": Operation(
        reads=COMPRESS_READS, leaves=COMPRESS_READS, compressors=COMPRESSORS, run=run_compress
    ),
    "compressed_attention": Operation(
        reads=("q", "k_cmp", "v_cmp"), leaves=("q", "k_cmp", "v_cmp"), run=_compressed
    ),
    "select_blocks": Operation(reads=("q", "k_cmp", "lse"), selects=True, run=_select),
    "selected_attention": Operation(
        reads=("q", "k_slc", "v_slc", "block_indices"),
        leaves=("q", "k_slc", "v_slc"),
        run=_selected,
    ),
    "window_attention": Operation(
        reads=("q", "k_win", "v_win"), leaves=("q", "k_win", "v_win"), run=_window
    ),
    "nsa_attention": Operation(reads=NSA_READS, leaves=NSA_READS, selects=True, run=_nsa),
    "pipeline": Operation(
        reads=PIPELINE_READS,
        leaves=PIPELINE_READS,
        selects=True,
        compressors=COMPRESSORS,
        run=_pipeline,
    ),
    "recompute_pipeline": Operation(
        reads=PIPELINE_READS,
        leaves=PIPELINE_READS,
        selects=True,
        compressors=COMPRESSORS,
        by_default=False,  # Its forward is that of the pipeline.
        run=partial(_pipeline, recompute=True),
    ),
    "shared_pipeline": Operation(
        reads=SHARED_READS,
        leaves=SHARED_READS,
        selects=True,
        compressors=("mean",),
        view=share,
        run=_shared_pipeline,
    ),
    "nsa_decode": Operation(reads=NSA_READS, selects=True, run=_decode),
    "dense_attention": Operation(reads=("q", "k_slc", "v_slc"), leaves=("q", "k_slc", "v_slc")),
    "dense_decode": Operation(reads=("q", "k_slc", "v_slc")),
}
