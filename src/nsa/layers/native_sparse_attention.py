"""Native Sparse Attention as a module: projections, rotation, gates and compressor around the op.

Where the paper leaves a choice, this module makes it: queries are rotated once for all branches;
phi sees keys before rotation, and the compressed key ``i`` is rotated at position
``i * d + l // 2``, the middle of its block; gates are one sigmoid per head and branch of a
two-layer MLP on the token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsa import ops
from nsa.cache import CachedKV, LayerCache, TokenKV
from nsa.config import NSAConfig
from nsa.layers.compressor import Compressor
from nsa.layers.head_norm import head_norm
from nsa.layers.head_shape import check_heads
from nsa.layers.inputs import check_inputs
from nsa.layers.rotary import rotate

# positions, integer [...] -> cos and sin [..., rotary_dim]
Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]


class BranchInputs(NamedTuple):
    """The tensors of ``nsa.nsa_attention``, in its order."""

    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor


class NativeSparseAttention(nn.Module):
    """The attention of one transformer block (eq. 5-12) with its projections.

    Args:
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: heads of keys and values; divides ``num_heads``.
        head_dim: channels of queries and keys (Dk).
        value_head_dim: channels of values (Dv); as ``head_dim`` if None.
        config: block sizes and counts.
        compressor: kind of phi, "mlp", "linear", "gated" or "mean".
        kv_per_branch: each branch has its own keys and values (the paper), or all share one pair.
            The rows of ``k_proj`` and ``v_proj`` are then those of cmp, slc and win, in this order.
        qk_norm_eps: epsilon of an RMSNorm on each head of queries and keys; no such norm if None.
        bias: of the four projections.
        recompute: as of ``nsa.nsa_attention``: keep lists of blocks and log-sum-exps for the
            backward, and compute the branch outputs again there. It saves three tensors of
            ``num_heads * value_head_dim`` values a token and costs most of a forward. May be set
            later, as the attribute.

    Raises:
        ValueError: a size does not fit; the message names it.

    Example:
        >>> from nsa.layers import default_frequencies, rotation
        >>> attention = NativeSparseAttention(64, 4, 2, 16, config=NSAConfig.tiny())
        >>> cos, sin = rotation(torch.arange(50), default_frequencies(16), dtype=torch.float32)
        >>> attention(torch.randn(1, 50, 64), cos, sin).shape
        torch.Size([1, 50, 64])
    """

    def __init__(  # noqa: PLR0913 - sizes and kinds of a layer
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        *,
        config: NSAConfig,
        compressor: str = "mlp",
        kv_per_branch: bool = True,
        qk_norm_eps: float | None = None,
        bias: bool = False,
        recompute: bool = False,
    ):
        super().__init__()
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        check_heads(hidden_size, num_heads, num_kv_heads, head_dim, value_head_dim)
        self.config = config
        self.recompute = recompute
        self.hidden_size, self.head_dim = hidden_size, head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.num_branches = 3 if kv_per_branch else 1
        kv_heads = self.num_branches * num_kv_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * value_head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * value_head_dim, hidden_size, bias=bias)
        self.q_norm = head_norm(head_dim, qk_norm_eps)
        self.k_norm = head_norm(head_dim, qk_norm_eps)
        self.compressor = Compressor(
            compressor,
            num_kv_heads,
            head_dim,
            value_head_dim,
            config.compress_block_size,
            config.compress_stride,
        )
        self.gate_mlp = nn.Sequential(
            nn.Linear(hidden_size, head_dim), nn.SiLU(), nn.Linear(head_dim, 3 * num_heads)
        )

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: LayerCache | None = None,
        rotary: Rotary | None = None,
        counts: list[int] | None = None,
    ) -> Tensor:
        """Attention of new tokens to themselves and to those in the cache.

        Args:
            hidden_states: ``[batch, seq, hidden_size]``; ``[1, tokens, hidden_size]`` when packed.
            cos: of the tokens' positions, ``[batch or 1, seq, rotary_dim]`` or
                ``[seq, rotary_dim]``.
            sin: like cos.
            cu_seqlens: int32 ``[num_seqs + 1]`` of packed sequences.
            max_seqlen: tokens of the longest of them, or more; None if that is not known.
            cache: receives the new tokens; what it holds comes before them. A cache that holds
                tokens already is for inference: no gradient reaches what it holds.
            rotary: gives cos and sin of the positions of new compressed blocks; required with a
                cache.
            counts: real tokens of each row when rows are right-padded and there is a cache.

        Returns:
            ``[batch, seq, hidden_size]``. Rows of padding are finite and mean nothing.

        Raises:
            ValueError: a shape or dtype does not fit, the message names the argument; a cache
                together with packed sequences, or without ``rotary``.
        """
        check_inputs(
            hidden_states,
            cos,
            sin,
            hidden_size=self.hidden_size,
            head_dim=self.head_dim,
            dtype=self.q_proj.weight.dtype,
        )
        if cache is not None and (cu_seqlens is not None or rotary is None):
            raise ValueError(
                "cache: expected with a rotary and without cu_seqlens, got rotary "
                f"{'None' if rotary is None else 'given'} and cu_seqlens "
                f"{'None' if cu_seqlens is None else 'given'}. Pass packed sequences without cache."
            )
        if cache is None or rotary is None:
            inputs = self.branch_inputs(hidden_states, cos, sin, cu_seqlens=cu_seqlens)
            o = ops.nsa_attention(
                *inputs,
                config=self.config,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                recompute=self.recompute,
            )
        elif max(cache.seq_lens, default=0) == 0:
            o = self._prefill(hidden_states, cos, sin, cache, counts)
        else:
            o = self._decode(hidden_states, cos, sin, cache, rotary, counts)
        o = o.flatten(-2)
        return self.o_proj(o.view(*hidden_states.shape[:-1], o.shape[-1]))

    def branch_inputs(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, *, cu_seqlens: Tensor | None = None
    ) -> BranchInputs:
        """Everything ``nsa.nsa_attention`` needs, for whole sequences.

        Args:
            hidden_states: as in ``forward``.
            cos: as in ``forward``.
            sin: as in ``forward``.
            cu_seqlens: as in ``forward``.

        Returns:
            ``q``, rotated; compressed keys (rotated) and values; keys (rotated) and values of the
            other branches; ``gates``. Rank 4, or rank 3 when packed.
        """
        if cu_seqlens is not None:
            if hidden_states.dim() != 3 or hidden_states.shape[0] != 1:
                raise ValueError(
                    "hidden_states: expected [1, tokens, hidden_size] with cu_seqlens, got "
                    f"{list(hidden_states.shape)}."
                )
            hidden_states, cos, sin = (x.view(x.shape[-2:]) for x in (hidden_states, cos, sin))
        q, gates, tokens = self._project(hidden_states, cos, sin)
        return self._with_compressed(q, gates, tokens, cos, sin, cu_seqlens)

    def _project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, TokenKV]:
        heads = (self.num_branches, self.num_kv_heads, -1)
        values = self.v_proj(x).unflatten(-1, heads).unbind(-3)
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, -1)))
        raw = self.k_norm(self.k_proj(x).unflatten(-1, heads)).unbind(-3)
        gates = self.gate_mlp(x).sigmoid().unflatten(-1, (self.num_heads, 3))
        keys = [rotate(k, cos, sin) for k in raw[-2:]]
        tokens = TokenKV(raw[0], values[0], keys[0], values[-2:][0], keys[-1], values[-1])
        return rotate(q, cos, sin), gates, tokens

    def _with_compressed(
        self,
        q: Tensor,
        gates: Tensor,
        tokens: TokenKV,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor | None,
    ) -> BranchInputs:
        k_cmp, v_cmp = self.compressor(tokens.k_cmp, tokens.v_cmp, cu_seqlens)
        middle, stride = self.config.compress_block_size // 2, self.config.compress_stride
        if cu_seqlens is None:
            at_blocks = [x[..., middle::stride, :][..., : k_cmp.shape[1], :] for x in (cos, sin)]
        else:
            index = _middle_of_slots(cu_seqlens, k_cmp.shape[0], len(q), middle, stride)
            at_blocks = [x[index] for x in (cos, sin)]
        return BranchInputs(q, rotate(k_cmp, *at_blocks), v_cmp, *tokens[2:], gates)

    def _prefill(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache,
        counts: list[int] | None,
    ) -> Tensor:
        q, gates, tokens = self._project(hidden_states, cos, sin)
        inputs = self._with_compressed(q, gates, tokens, cos, sin, None)
        cache.append(tokens, lambda k, v, first: (inputs.k_cmp, inputs.v_cmp), counts)
        return ops.nsa_attention(*inputs, config=self.config, recompute=self.recompute)

    def _decode(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache,
        rotary: Rotary,
        counts: list[int] | None,
    ) -> Tensor:
        q, gates, tokens = self._project(hidden_states, cos, sin)
        cache.append(tokens, lambda k, v, first: self._compress(k, v, first, rotary), counts)
        counts = counts or [q.shape[1]] * q.shape[0]
        lengths = torch.tensor(cache.seq_lens, device=q.device)
        cached = cache.tensors()
        if set(counts) == {q.shape[1]}:
            return ops.nsa_decode(q, *cached, gates, seq_lens=lengths, config=self.config)
        # Right-padded rows: those with equally many new tokens are computed together.
        o = cached.v_slc.new_zeros(*q.shape[:3], cached.v_slc.shape[-1])
        for count in set(counts) - {0}:
            rows = torch.tensor(
                [row for row, n in enumerate(counts) if n == count], device=q.device
            )
            o[rows, :count] = ops.nsa_decode(
                q[rows, :count],
                *CachedKV(*[x[rows] for x in cached]),
                gates[rows, :count],
                seq_lens=lengths[rows],
                config=self.config,
            )
        return o

    def _compress(
        self, k: Tensor, v: Tensor, first: list[int], rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        k_cmp, v_cmp = self.compressor(k, v)
        index = torch.arange(k_cmp.shape[1], device=k.device)
        blocks = torch.tensor(first, device=k.device)[:, None] + index
        middle = blocks * self.config.compress_stride + self.config.compress_block_size // 2
        return rotate(k_cmp, *rotary(middle)), v_cmp


def _middle_of_slots(
    cu_seqlens: Tensor, num_slots: int, num_tokens: int, middle: int, stride: int
) -> Tensor:
    """The packed index of the middle token of each slot's block; any token for an unused slot.

    Sequence ``b`` owns the slots from ``cu_seqlens[b] // stride`` on. Of sequences that start at
    the same slot only the last can be long enough to have a block.
    """
    first_slots = cu_seqlens // stride
    slots = torch.arange(num_slots, device=cu_seqlens.device)
    sequence = torch.searchsorted(first_slots, slots, right=True) - 1
    token = cu_seqlens[sequence] + (slots - first_slots[sequence]) * stride + middle
    return token.clamp(max=num_tokens - 1)
