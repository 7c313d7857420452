"""The attention module: what it hands to the op, packed sequences, and decoding with a cache."""

from __future__ import annotations

import pytest
import torch

from nsa import ops
from nsa.bench.timing import kept_memory_bytes
from nsa.cache import LayerCache
from nsa.config import NSAConfig
from nsa.layers import NativeSparseAttention, default_frequencies, rotate, rotation
from nsa.ops.compress_kv import KINDS

CONFIG = NSAConfig(
    compress_block_size=8,
    compress_stride=4,
    block_size=16,
    num_selected_blocks=3,
    num_local_blocks=1,
    window_size=10,
)
DTYPE = torch.float64


def rotary(positions):
    return rotation(positions, default_frequencies(8), dtype=DTYPE)


def attention(**kwargs) -> NativeSparseAttention:
    torch.manual_seed(0)
    module = NativeSparseAttention(32, 4, 2, 8, 6, config=CONFIG, **kwargs).to(DTYPE)
    with torch.no_grad():  # phi away from mean pooling
        for weight in module.compressor.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return module


def tokens(batch: int, seq: int):
    torch.manual_seed(1)
    return torch.randn(batch, seq, 32, dtype=DTYPE), *rotary(torch.arange(seq)[None])


@pytest.mark.parametrize("kv_per_branch", [True, False], ids=["own-kv", "shared-kv"])
@pytest.mark.parametrize("qk_norm_eps", [None, 1e-6], ids=["plain", "qk-norm"])
def test_branch_inputs_are_the_projections(kv_per_branch, qk_norm_eps):
    module = attention(kv_per_branch=kv_per_branch, qk_norm_eps=qk_norm_eps, bias=True)
    x, cos, sin = tokens(2, 21)
    found = module.branch_inputs(x, cos, sin)
    rows = [0, 1, 2] if kv_per_branch else [0, 0, 0]
    keys = [module.k_norm(module.k_proj(x).view(2, 21, -1, 2, 8)[:, :, row]) for row in rows]
    values = [module.v_proj(x).view(2, 21, -1, 2, 6)[:, :, row] for row in rows]
    assert torch.allclose(
        found.q, rotate(module.q_norm(module.q_proj(x).view(2, 21, 4, 8)), cos, sin)
    )
    for found_k, found_v, k, v in zip(
        found[3:7:2], found[4:7:2], keys[1:], values[1:], strict=True
    ):
        assert torch.allclose(found_k, rotate(k, cos, sin))
        assert torch.allclose(found_v, v)
    # phi sees keys before rotation; block i is rotated at its middle, i * 4 + 4.
    k_cmp, v_cmp = module.compressor(keys[0], values[0])
    middle = torch.tensor([4, 8, 12, 16])
    assert torch.allclose(found.k_cmp, rotate(k_cmp, *(x[None] for x in rotary(middle))))
    assert torch.allclose(found.v_cmp, v_cmp)
    gates = module.gate_mlp(x).sigmoid().view(2, 21, 4, 3)
    assert torch.allclose(found.gates, gates)
    assert 0 < found.gates.min() < found.gates.max() < 1


def test_forward_is_the_op_between_projections():
    module = attention()
    x, cos, sin = tokens(2, 21)
    o = ops.nsa_attention(*module.branch_inputs(x, cos, sin), config=CONFIG)
    assert torch.equal(module(x, cos, sin), module.o_proj(o.flatten(-2)))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_separate_sequences(kind):
    module = attention(compressor=kind)
    # Sequences with several blocks start at every remainder of the stride.
    lengths = [3, 0, 30, 1, 8, 24, 27, 0, 2, 33, 25, 0]
    x, cos, sin = tokens(1, sum(lengths))
    at = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = module(x, cos[:, at], sin[:, at], cu_seqlens=cu_seqlens)
    pieces = [
        module(part, cos[:, : part.shape[1]], sin[:, : part.shape[1]])
        for part in x.split(lengths, dim=1)
        if part.shape[1]
    ]
    assert torch.allclose(packed, torch.cat(pieces, dim=1))


@pytest.mark.parametrize("kv_per_branch", [True, False], ids=["own-kv", "shared-kv"])
@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param([1] * 60, id="token-by-token"),
        pytest.param([7, 1, 1, 25, 26], id="chunks"),
        pytest.param([60], id="prefill"),
    ],
)
def test_cached_calls_equal_one_call(kv_per_branch, cuts):
    module = attention(kv_per_branch=kv_per_branch)
    x, cos, sin = tokens(2, 60)
    cache, outputs, start = LayerCache(CONFIG), [], 0
    with torch.no_grad():
        whole = module(x, cos, sin)
        for size in cuts:
            at = slice(start, start + size)
            outputs.append(module(x[:, at], cos[:, at], sin[:, at], cache=cache, rotary=rotary))
            start += size
    assert torch.allclose(torch.cat(outputs, dim=1), whole)
    assert cache.seq_lens == [60, 60]


def test_right_padded_rows_of_different_lengths():
    module = attention()
    x, cos, sin = tokens(3, 50)
    steps = [[0, 20, 3], [17, 0, 20], [1, 1, 1], [20, 4, 0], [1, 1, 1]]
    cache, starts = LayerCache(CONFIG), [0, 0, 0]
    with torch.no_grad():
        whole = module(x, cos, sin)
        for counts in steps:
            new = torch.zeros(3, max(counts), 32, dtype=DTYPE)
            for row, (start, n) in enumerate(zip(starts, counts, strict=True)):
                new[row, :n] = x[row, start : start + n]
            at = torch.tensor(starts)[:, None] + torch.arange(max(counts))
            out = module(new, *rotary(at), cache=cache, rotary=rotary, counts=counts)
            for row, (start, n) in enumerate(zip(starts, counts, strict=True)):
                assert torch.allclose(out[row, :n], whole[row, start : start + n])
            assert out.isfinite().all()
            starts = [start + n for start, n in zip(starts, counts, strict=True)]
    assert cache.seq_lens == starts


def test_prefill_into_a_cache_keeps_gradients():
    module = attention()
    x, cos, sin = tokens(1, 30)
    grads = []
    for cache in (None, LayerCache(CONFIG)):
        out = module(x, cos, sin, cache=cache, rotary=rotary)
        grads.append(torch.autograd.grad(out.square().sum(), list(module.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_recomputing_gives_the_same_gradients_and_keeps_no_branch_output():
    plain, again = attention(), attention(recompute=True)
    x, cos, sin = tokens(2, 60)
    prefill = {"cache": LayerCache(CONFIG), "rotary": rotary}
    bounds = torch.tensor([0, 25, 60], dtype=torch.int32)
    for rows, options in ((2, {}), (1, {"cu_seqlens": bounds}), (2, prefill)):
        grads, kept = [], []
        for module in (plain, again):

            def forward(module=module, rows=rows, options=options):
                if "cache" in options:
                    options = {**options, "cache": LayerCache(CONFIG)}
                return (module(x[:rows], cos, sin, **options),)

            kept.append(kept_memory_bytes(forward))
            loss = forward()[0].square().sum()
            grads.append(torch.autograd.grad(loss, list(module.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        output = rows * 60 * 4 * 6 * DTYPE.itemsize
        assert kept[0] - kept[1] == 3 * output


def test_recompute_is_a_flag():
    x, cos, sin = tokens(1, 9)
    with pytest.raises(ValueError, match="recompute: expected True or False, got 'no'"):
        attention(recompute="no")(x, cos, sin)


def test_no_silent_gradient_through_a_filled_cache():
    module = attention()
    x, cos, sin = tokens(1, 30)
    cache = LayerCache(CONFIG)
    module(x[:, :29], cos[:, :29], sin[:, :29], cache=cache, rotary=rotary)
    out = module(x[:, 29:], cos[:, 29:], sin[:, 29:], cache=cache, rotary=rotary)
    with pytest.raises(NotImplementedError, match="nsa_decode: it is for inference"):
        out.sum().backward()


def test_every_parameter_gets_a_gradient():
    module = attention(qk_norm_eps=1e-6, bias=True)
    x, cos, sin = tokens(2, 40)
    module(x, cos, sin).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


def test_one_dtype_under_autocast():
    module = attention(qk_norm_eps=1e-6).float()
    x, cos, sin = (t.float() for t in tokens(1, 30))
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in module.branch_inputs(x, cos, sin)} == {torch.bfloat16}
        assert module(x, cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param({}, "got rotary None and cu_seqlens None", id="no-rotary"),
        pytest.param(
            {"rotary": rotary, "cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)},
            "got rotary given and cu_seqlens given",
            id="packed",
        ),
    ],
)
def test_cache_with_what_it_cannot_serve(kwargs, message):
    x, cos, sin = tokens(1, 9)
    with pytest.raises(ValueError, match=f"cache: expected with a rotary.*{message}"):
        attention()(x, cos, sin, cache=LayerCache(CONFIG), **kwargs)


def test_packed_needs_one_row():
    x, cos, sin = tokens(2, 9)
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"hidden_states: expected \[1, tokens, hidden_size\]"):
        attention()(x, cos, sin, cu_seqlens=bounds)


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor"):
        NativeSparseAttention(32, 4, 3, 8, config=CONFIG)
