"""Dense causal attention with the same projections: what a sparse model is compared with."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from nsa.layers.head_norm import head_norm
from nsa.layers.head_shape import check_heads
from nsa.layers.inputs import check_inputs
from nsa.layers.rotary import rotate

# new keys and values [batch, kv_heads, seq, dim] -> all of them, the cached ones first
UpdateKV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# PyTorch 2.11 takes fewer heads of keys than of queries unasked.
GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
)


class DenseAttention(nn.Module):
    """Grouped-query attention by ``torch.nn.functional.scaled_dot_product_attention``.

    Packed sequences take ``torch.nn.attention.varlen`` where it applies: on CUDA, in 16 bits.

    Args:
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: heads of keys and values; divides ``num_heads``.
        head_dim: channels of queries and keys.
        value_head_dim: channels of values; as ``head_dim`` if None.
        qk_norm_eps: epsilon of an RMSNorm on each head of queries and keys; no such norm if None.
        bias: of the four projections.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        *,
        qk_norm_eps: float | None = None,
        bias: bool = False,
    ):
        super().__init__()
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        check_heads(hidden_size, num_heads, num_kv_heads, head_dim, value_head_dim)
        self.hidden_size, self.head_dim = hidden_size, head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * value_head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * value_head_dim, hidden_size, bias=bias)
        self.q_norm = head_norm(head_dim, qk_norm_eps)
        self.k_norm = head_norm(head_dim, qk_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        lengths: list[int] | None = None,
        mask: Tensor | None = None,
        update: UpdateKV | None = None,
    ) -> Tensor:
        """Causal attention.

        Args:
            hidden_states: ``[batch, seq, hidden_size]``; ``[1, tokens, hidden_size]`` when packed.
            cos: of the tokens' positions, ``[batch or 1, seq, rotary_dim]`` or
                ``[seq, rotary_dim]``.
            sin: like cos.
            cu_seqlens: int32 ``[num_seqs + 1]`` of packed sequences, with ``lengths`` or ``mask``
                for where torch has no kernel that takes it.
            lengths: tokens of each packed sequence, which are then attended to one by one.
            mask: bool ``[batch, 1, seq, keys]``, True where a query sees a key; causal if None.
            update: adds the new keys and values to a cache and returns all.

        Returns:
            ``[batch, seq, hidden_size]``.

        Raises:
            ValueError: a shape or dtype does not fit; the message names the argument.
        """
        check_inputs(
            hidden_states,
            cos,
            sin,
            hidden_size=self.hidden_size,
            head_dim=self.head_dim,
            dtype=self.q_proj.weight.dtype,
        )
        q, k = self.queries_and_keys(hidden_states, cos, sin)
        v = self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, -1))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if update is not None:
            k, v = update(k, v)
        if cu_seqlens is not None and _has_packed(q, v):
            o = _attend_packed(q, k, v, cu_seqlens, max(lengths) if lengths else q.shape[2])
        elif lengths is None:
            o = _attend(q, k, v, mask)
        else:
            pieces = zip(*[x.split(lengths, dim=2) for x in (q, k, v)], strict=True)
            o = torch.cat([_attend(a, b, c, None) for a, b, c in pieces], dim=2)
        return self.o_proj(o.transpose(1, 2).flatten(-2))

    def queries_and_keys(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the logits are products of; arguments as in ``forward``.

        Returns:
            Queries ``[batch, seq, num_heads, head_dim]`` and keys ``[batch, seq, num_kv_heads,
            head_dim]``, normed and rotated.
        """
        q = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1)))
        k = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (self.num_kv_heads, -1)))
        return rotate(q, cos, sin), rotate(k, cos, sin)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def _has_packed(q: Tensor, v: Tensor) -> bool:
    """Whether torch has a kernel for packed sequences of such tensors."""
    dim = q.shape[-1]
    sizes = dim == v.shape[-1] and dim % 8 == 0 and dim <= 256
    return sizes and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    o = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), **GROUPED
    )
    assert isinstance(o, Tensor), "asked for the output alone"
    return o.transpose(0, 1)[None]
