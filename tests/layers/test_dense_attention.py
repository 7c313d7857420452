"""The dense twin's attention against a softmax written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nsa.layers import DenseAttention, default_frequencies, dense_attention, rotate, rotation


def inputs(seq: int):
    torch.manual_seed(0)
    module = DenseAttention(32, 4, 2, 8, 6, qk_norm_eps=1e-6, bias=True).double()
    cos, sin = rotation(torch.arange(seq)[None], default_frequencies(8), dtype=torch.float64)
    return module, torch.randn(2, seq, 32, dtype=torch.float64), cos, sin


def by_hand(module: DenseAttention, x, cos, sin, visible):
    q = rotate(module.q_norm(module.q_proj(x).unflatten(-1, (4, 8))), cos, sin)
    k = rotate(module.k_norm(module.k_proj(x).unflatten(-1, (2, 8))), cos, sin)
    v = module.v_proj(x).unflatten(-1, (2, 6))
    k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 8**0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return module.o_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(-2))


def test_causal_grouped_attention():
    module, x, cos, sin = inputs(13)
    visible = torch.ones(13, 13, dtype=torch.bool).tril()
    assert torch.allclose(module(x, cos, sin), by_hand(module, x, cos, sin, visible))


def test_logits_are_products_of_the_queries_and_keys():
    module, x, cos, sin = inputs(9)
    q, k = module.queries_and_keys(x, cos, sin)
    assert (q.shape, k.shape) == ((2, 9, 4, 8), (2, 9, 2, 8))
    expected = rotate(module.k_norm(module.k_proj(x).unflatten(-1, (2, 8))), cos, sin)
    assert torch.equal(k, expected)
    v = module.v_proj(x).unflatten(-1, (2, 6)).repeat_interleave(2, dim=2)
    logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, dim=2)) / 8**0.5
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    o = logits.masked_fill(~visible, -torch.inf).softmax(-1) @ v.transpose(1, 2)
    assert torch.allclose(module(x, cos, sin), module.o_proj(o.transpose(1, 2).flatten(-2)))


def test_a_mask_replaces_causality():
    module, x, cos, sin = inputs(7)
    visible = torch.rand(7, 7) > 0.5
    visible.fill_diagonal_(True)
    found = module(x, cos, sin, mask=visible[None, None])
    assert torch.allclose(found, by_hand(module, x, cos, sin, visible))


def test_packed_sequences_do_not_see_each_other():
    module, x, cos, sin = inputs(12)
    lengths, packed = [5, 0, 1, 6], x[:1]
    pieces = [
        module(part, cos[:, : part.shape[1]], sin[:, : part.shape[1]])
        for part in packed.split(lengths, dim=1)
        if part.shape[1]
    ]
    at = torch.cat([torch.arange(n) for n in lengths])
    found = module(packed, cos[:, at], sin[:, at], lengths=lengths)
    assert torch.allclose(found, torch.cat(pieces, dim=1))


def test_packed_sequences_take_the_kernel_for_them(monkeypatch):
    """Where it applies; here in the place of that of CUDA, one sequence after the other."""

    def packed(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, **_):
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == 7
        assert window_size == (-1, 0)  # Causal.
        sizes = cu_q.diff().tolist()
        parts = zip(*(x.transpose(0, 1)[None].split(sizes, dim=2) for x in (q, k, v)), strict=True)
        whole = [
            scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts
        ]
        return torch.cat(whole, dim=2)[0].transpose(0, 1)

    module, x, cos, sin = inputs(12)
    lengths, cu_seqlens = [5, 0, 7], torch.tensor([0, 5, 5, 12]).int()
    expected = module(x[:1], cos, sin, cu_seqlens=cu_seqlens, lengths=lengths)
    assert torch.equal(expected, module(x[:1], cos, sin, lengths=lengths))
    monkeypatch.setattr(dense_attention, "_has_packed", lambda q, v: True)
    monkeypatch.setattr(dense_attention, "varlen_attn", packed)
    found = module(x[:1], cos, sin, cu_seqlens=cu_seqlens, lengths=lengths)
    assert torch.allclose(found, expected)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")  # A thread's first.
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_packed_sequences_on_a_gpu(compiled):
    torch.use_deterministic_algorithms(False)  # PyTorch's attention warns of it.
    torch.manual_seed(0)
    module = DenseAttention(64, 8, 2, 64).cuda().bfloat16()
    lengths = [300, 0, 1, 211, 0]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    x = torch.randn(1, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    at = torch.cat([torch.arange(n) for n in lengths])
    cos, sin = (
        part.cuda() for part in rotation(at[None], default_frequencies(64), dtype=torch.bfloat16)
    )
    go = torch.randn_like(x)
    pieces = module(x, cos, sin, lengths=lengths)
    expected = [pieces, *torch.autograd.grad(pieces, [x, *module.parameters()], go)]
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    lengths = None if compiled else lengths
    o = call(x, cos, sin, cu_seqlens=cu_seqlens, lengths=lengths)
    found = [o, *torch.autograd.grad(o, [x, *module.parameters()], go)]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 0.01 * b.norm()


def test_update_hands_over_new_keys_and_takes_all():
    module, x, cos, sin = inputs(9)
    stored = []

    def update(k, v):
        assert k.shape == (2, 2, k.shape[2], 8)
        assert v.shape == (2, 2, v.shape[2], 6)
        stored.append((k, v))
        return tuple(torch.cat(parts, dim=2) for parts in zip(*stored, strict=True))

    whole = module(x, cos, sin)
    module(x[:, :8], cos[:, :8], sin[:, :8], update=update)
    everything = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    last = module(x[:, 8:], cos[:, 8:], sin[:, 8:], mask=everything, update=update)
    assert torch.allclose(last, whole[:, 8:])
