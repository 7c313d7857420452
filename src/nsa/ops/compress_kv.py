"""Public op: learned compression of keys and values (phi of eq. 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from nsa.ops import checks
from nsa.ops.backend import custom_op, differentiable, implementation, resolve_backend

KINDS = ("mlp", "linear", "gated", "mean")


class CompressorWeights(NamedTuple):
    """Weights of one phi; which are needed depends on the kind (see ``compress_kv``)."""

    pe: Tensor | None = None
    w1: Tensor | None = None
    w2: Tensor | None = None


def compress_kv(
    k: Tensor,
    v: Tensor,
    phi_k: CompressorWeights = CompressorWeights(),  # noqa: B008
    phi_v: CompressorWeights = CompressorWeights(),  # noqa: B008
    *,
    kind: str,
    compress_block_size: int,
    compress_stride: int,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Maps each block of tokens to one compressed key and one compressed value (eq. 7).

    A block is ``compress_block_size`` tokens long, and one starts every ``compress_stride`` tokens.
    With ``x`` the block plus its intra-block positions ``pe``: "mean" is ``mean(x)``; "linear"
    ``W1 flatten(x)``; "gated" ``sum_s softmax_s(W1 x_s) * x_s``; "mlp"
    ``mean(x) + W2 silu(W1 flatten(x))``.

    Args:
        k: keys before rotation ``[batch, seq, kv_heads, Dk]``, or packed
            ``[tokens, kv_heads, Dk]``.
        v: values ``[batch, seq, kv_heads, Dv]``, or packed.
        phi_k: weights for keys: ``pe [kv_heads, block, D]``; ``w1`` is ``[D, block * D]`` (linear),
            ``[D, D]`` (gated) or ``[F, block * D]`` (mlp); ``w2 [D, F]`` (mlp). "mean" takes none.
        phi_v: weights for values.
        kind: "mlp", "linear", "gated" or "mean".
        compress_block_size: tokens per block.
        compress_stride: tokens between blocks.
        cu_seqlens: int32 ``[num_seqs + 1]``, exactly when k is packed: where sequences
            start, from 0 to the number of tokens, never decreasing (read and checked on a CPU
            only).
        backend: ``"reference"`` or ``"kernel"``; by device if None.

    Returns:
        ``k_cmp [batch, T_c, kv_heads, Dk]`` and ``v_cmp``, with
        ``T_c = (seq - block) // stride + 1`` (0 below a block).
        Packed: ``[tokens // stride, ...]``; sequence ``b`` starts at slot
        ``cu_seqlens[b] // stride``, unused slots are 0.

    Raises:
        ValueError: shapes, dtypes, devices or weights do not fit; the message names the argument.

    Example:
        >>> k = v = torch.randn(1, 64, 2, 16)
        >>> compress_kv(k, v, kind="mean", compress_block_size=32, compress_stride=16)[0].shape
        torch.Size([1, 3, 2, 16])
    """
    checks.geometry(compress_block_size, compress_stride)
    checks.mode("k", k, cu_seqlens)
    checks.same_kind("v", v, k, like="k")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"v: expected {list(k.shape[:-1])} + [dim] like k, got {checks.describe(v)}."
        )
    for x, phi, side in ((k, phi_k, "phi_k"), (v, phi_v, "phi_v")):
        _check_weights(x, phi, side, kind, compress_block_size)
        backend = resolve_backend(x, backend)
    sizes = (compress_block_size, compress_stride)
    return _compress(k, v, *phi_k, *phi_v, cu_seqlens, kind, *sizes, backend)


def _check_weights(x: Tensor, phi: CompressorWeights, side: str, kind: str, block: int) -> None:
    if not isinstance(phi, CompressorWeights):
        raise ValueError(
            f"{side}: expected nsa.CompressorWeights(pe, w1, w2), got {type(phi).__name__}."
        )
    for name, weight in zip(phi._fields, phi, strict=True):
        if weight is not None:
            checks.tensor(f"{side}.{name}", weight)
    num_kv_heads, dim = x.shape[-2:]
    hidden = phi.w1.shape[0] if kind == "mlp" and phi.w1 is not None and phi.w1.dim() else dim
    pe = [num_kv_heads, block, dim]
    expected: dict[str, tuple[list[int] | None, ...]] = {
        "mlp": (pe, [hidden, block * dim], [dim, hidden]),
        "linear": (pe, [dim, block * dim], None),
        "gated": (pe, [dim, dim], None),
        "mean": (None, None, None),
    }
    if kind not in expected:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}.")
    for name, weight, shape in zip(phi._fields, phi, expected[kind], strict=True):
        found = None if weight is None else list(weight.shape)
        if found != shape:
            raise ValueError(f"{side}.{name}: expected {shape} for kind {kind!r}, got {found}.")
        if weight is not None and (weight.dtype != x.dtype or weight.device != x.device):
            raise ValueError(
                f"{side}.{name}: expected {x.dtype} on {x.device} like the tokens, got "
                f"{weight.dtype} on {weight.device}."
            )


# One op for both: an op with a gradient costs the host as much as a launch.
@custom_op("nsa::compress_kv_fwd")
def compress_kv_fwd(
    k: Tensor,
    v: Tensor,
    pe_k: Tensor | None,
    w1_k: Tensor | None,
    w2_k: Tensor | None,
    pe_v: Tensor | None,
    w1_v: Tensor | None,
    w2_v: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    compress_block_size: int,
    compress_stride: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Compressed blocks of keys and values."""
    options = _options(cu_seqlens, kind, compress_block_size, compress_stride)
    columns = ((k, v), (pe_k, pe_v), (w1_k, w1_v), (w2_k, w2_v))
    compress = implementation(backend).compress_fwd
    k_cmp, v_cmp = _of_sides(compress, columns, options, backend)
    return k_cmp, v_cmp


def _of_sides(function: Callable, columns: tuple, options: dict, backend: str) -> list:
    """What a function gives for keys and for values: the kernels take both at once."""
    if backend == "kernel":
        return function(*columns, **options)
    return [function(*side, **options) for side in zip(*columns, strict=True)]


def _options(cu_seqlens: Tensor | None, kind: str, block: int, stride: int) -> dict:
    return {
        "cu_seqlens": cu_seqlens,
        "kind": kind,
        "compress_block_size": block,
        "compress_stride": stride,
    }


@compress_kv_fwd.register_fake
def _(k, v, *others):
    cu_seqlens, _, block, stride, _ = others[-5:]
    if cu_seqlens is not None:
        lead = (k.shape[0] // stride,)
    else:
        seq = k.shape[1]
        lead = (k.shape[0], 0 if seq < block else (seq - block) // stride + 1)
    return k.new_empty(*lead, *k.shape[-2:]), v.new_empty(*lead, *v.shape[-2:])


@custom_op("nsa::compress_kv_bwd")
def compress_kv_bwd(
    dk_cmp: Tensor,
    dv_cmp: Tensor,
    k: Tensor,
    v: Tensor,
    pe_k: Tensor | None,
    w1_k: Tensor | None,
    w2_k: Tensor | None,
    pe_v: Tensor | None,
    w1_v: Tensor | None,
    w2_v: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    compress_block_size: int,
    compress_stride: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the eight tensors; an empty tensor for each weight that is None."""
    options = _options(cu_seqlens, kind, compress_block_size, compress_stride)
    columns = ((dk_cmp, dv_cmp), (k, v), (pe_k, pe_v), (w1_k, w1_v), (w2_k, w2_v))
    gradients = implementation(backend).compress_bwd
    (dk, *dphi_k), (dv, *dphi_v) = _of_sides(gradients, columns, options, backend)
    return dk, dv, *dphi_k, *dphi_v


@compress_kv_bwd.register_fake
def _(dk_cmp, dv_cmp, *others):
    k, tensors = others[0], others[:8]
    return tuple(k.new_empty(0 if like is None else like.shape) for like in tensors)


def _setup_context(ctx, inputs, output):
    ctx.constants = inputs[9:]
    ctx.save_for_backward(*inputs[:9])


def _backward(ctx, dk_cmp, dv_cmp):
    *tensors, cu_seqlens = ctx.saved_tensors
    grads = compress_kv_bwd(dk_cmp, dv_cmp, *tensors, cu_seqlens, *ctx.constants)
    given = [None if like is None else grad for like, grad in zip(tensors, grads, strict=True)]
    return *given, *[None] * (1 + len(ctx.constants))


_compress = differentiable(compress_kv_fwd, _setup_context, _backward)
