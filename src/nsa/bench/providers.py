"""Who computes an operation: this package's backends, and what PyTorch ships.

To measure one more implementation, add a ``Provider`` to ``PROVIDERS``. For each operation it
offers, it gives a function that gets the tensors ready outside the measured time and returns the
call to measure; the call returns the operation's outputs in the layout of ``nsa.ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa.bench import fla_attention, flex_attention
from nsa.bench.operations import OPERATIONS, Operation
from nsa.bench.workloads import Tensors
from nsa.config import NSAConfig

Outputs = tuple[Tensor, ...]
Prepare = Callable[[Tensors, NSAConfig], Callable[[], Outputs]]

# A mask of seq x seq entries per kv head takes gigabytes beyond this.
MAX_MASKED_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """One implementation.

    Args:
        name: what ``--provider`` takes.
        about: one line for the table of providers.
        devices: device types it runs on.
        backend: backend of this package that prepares its inputs (compressed keys, chosen blocks).
        operations: for each operation it offers, how to prepare the call.
        max_tokens: for operations that it cannot do at every length, the longest it is measured at.
    """

    name: str
    about: str
    devices: tuple[str, ...]
    backend: str
    operations: dict[str, Prepare]
    max_tokens: dict[str, int] = field(default_factory=dict)

    def offers(self, operation: str, seq_len: int) -> bool:
        """Whether it has the operation, and at this length."""
        limit = self.max_tokens.get(operation, seq_len)
        return operation in self.operations and seq_len <= limit


def _nsa(name: str, about: str, devices: tuple[str, ...], operations: list[str]) -> Provider:
    def prepare(entry: Operation, tensors: Tensors, config: NSAConfig) -> Callable[[], Outputs]:
        assert entry.run is not None, "only operations of this package are offered"
        return partial(entry.run, tensors, config, name)

    offered: dict[str, Prepare] = {op: partial(prepare, OPERATIONS[op]) for op in operations}
    return Provider(name=name, about=about, devices=devices, backend=name, operations=offered)


def _attend(
    tensors: Tensors,
    branch: str,
    *,
    mask: Tensor | None = None,
    last_only: bool = False,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Callable[[], Outputs]:
    """Scaled dot-product attention in PyTorch's layout and back: causal unless there is a mask."""

    def call() -> Outputs:
        q = tensors["q"][:, -1:] if last_only else tensors["q"]
        q, k, v = (x.transpose(1, 2) for x in (q, tensors[f"k_{branch}"], tensors[f"v_{branch}"]))
        with context():
            o = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and not last_only, enable_gqa=True
            )
        return (o.transpose(1, 2),)

    return call


def _window(tensors: Tensors, config: NSAConfig) -> Callable[[], Outputs]:
    positions = _positions(tensors)
    distance = positions[:, None] - positions
    return _attend(tensors, "win", mask=(distance >= 0) & (distance < config.window_size))


def _selected(tensors: Tensors, config: NSAConfig) -> Callable[[], Outputs]:
    positions = _positions(tensors)
    chosen = tensors["block_indices"].transpose(1, 2)  # [1, kv_heads, seq, n]
    mask = torch.zeros(*chosen.shape[:3], len(positions), dtype=torch.bool, device=chosen.device)
    for column in chosen.unbind(-1):
        mask |= column[..., None] == positions // config.block_size
    mask &= positions[:, None] >= positions
    group_size = tensors["q"].shape[2] // mask.shape[1]
    return _attend(tensors, "slc", mask=mask.repeat_interleave(group_size, dim=1))


def _positions(tensors: Tensors) -> Tensor:
    return torch.arange(tensors["q"].shape[1], device=tensors["q"].device)


def _dense(backend: SDPBackend) -> dict[str, Prepare]:
    """Dense attention by one of PyTorch's own kernels, or an error."""

    def prepare(tensors: Tensors, _config: NSAConfig) -> Callable[[], Outputs]:
        return _attend(tensors, "slc", context=lambda: sdpa_kernel(backend))

    return {"dense_attention": prepare}


NSA_OPERATIONS = [name for name, entry in OPERATIONS.items() if entry.run is not None]

PROVIDERS = {
    provider.name: provider
    for provider in (
        _nsa("reference", "this package, plain PyTorch", ("cpu", "cuda"), NSA_OPERATIONS),
        _nsa(
            "kernel",
            "this package, Triton kernels",
            ("cuda",),
            [name for name in NSA_OPERATIONS if name != "nsa_decode"],
        ),
        Provider(
            name="sdpa",
            about="torch scaled_dot_product_attention: dense, or with a dense mask",
            devices=("cpu", "cuda"),
            backend="reference",
            operations={
                "selected_attention": _selected,
                "window_attention": _window,
                "dense_attention": lambda tensors, _config: _attend(tensors, "slc"),
                "dense_decode": lambda tensors, _config: _attend(tensors, "slc", last_only=True),
            },
            max_tokens=dict.fromkeys(("selected_attention", "window_attention"), MAX_MASKED_TOKENS),
        ),
        Provider(
            name="cudnn",
            about="cuDNN's dense attention through torch",
            devices=("cuda",),
            backend="reference",
            operations=_dense(SDPBackend.CUDNN_ATTENTION),
        ),
        Provider(
            name="flash",
            about="FlashAttention-2's dense attention through torch",
            devices=("cuda",),
            backend="reference",
            operations=_dense(SDPBackend.FLASH_ATTENTION),
        ),
        Provider(
            name="flex",
            about="torch FlexAttention with block masks, compiled",
            devices=("cuda",),
            backend="kernel",
            operations={
                "compressed_attention": flex_attention.compressed,
                "selected_attention": flex_attention.selected,
                "window_attention": flex_attention.window,
                "dense_attention": flex_attention.dense,
            },
        ),
        Provider(
            name="fla",
            about="flash-linear-attention's parallel_nsa, if fla is installed",
            devices=("cuda",) if fla_attention.AVAILABLE else (),
            backend="kernel",
            operations={"shared_pipeline": fla_attention.shared_pipeline},
        ),
    )
}
