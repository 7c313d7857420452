from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.inspect.sample import CONFIG
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from nsa.inspect import Trace, trace
from nsa.models import NSAForCausalLM, NSAModelConfig, convert_from_dense

GEOMETRY = {
    name: getattr(CONFIG, name)
    for name in (
        "compress_block_size",
        "compress_stride",
        "block_size",
        "num_selected_blocks",
        "window_size",
    )
}


SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOWED = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1)


def make_model(attention: str = "nsa", **changes: object) -> NSAForCausalLM:
    torch.manual_seed(0)
    return NSAForCausalLM(NSAModelConfig(attention=attention, **GEOMETRY, **{**SIZES, **changes}))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(60, (90,), generator=torch.Generator().manual_seed(1))


def test_trace_sees_what_the_attention_was_given(ids, monkeypatch):
    model = make_model()
    seen = []
    from nsa import ops

    real = ops.nsa_attention

    def spy(*tensors, **options):
        seen.append(tensors)
        return real(*tensors, **options)

    monkeypatch.setattr("nsa.layers.native_sparse_attention.ops.nsa_attention", spy)
    looked = trace(model, ids)
    assert list(looked.layers) == [0, 1]
    for layer, tensors in enumerate(seen):
        q, k_cmp, gates = tensors[0], tensors[1], tensors[7]
        _, lse = ops.compressed_attention(q, k_cmp, k_cmp, compress_block_size=8, compress_stride=4)
        chosen = ops.select_blocks(q, k_cmp, lse, config=CONFIG)
        np.testing.assert_array_equal(looked.layers[layer].block_indices, chosen[0].numpy())
        np.testing.assert_array_equal(looked.layers[layer].gates, gates[0].detach().numpy())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"kv_per_branch": False}, id="shared-kv"),
        pytest.param({"qk_norm": True}, id="qk-norm"),
        pytest.param({"v_head_dim": 6}, id="narrow-values"),
    ],
)
def test_trace_of_model_variants(ids, changes):
    looked = trace(make_model(**changes), ids)
    assert (looked.layers[1].recall > 0).all()
    assert (looked.layers[1].recall <= 1 + 1e-5).all()


def test_twin_recall_is_full_where_everything_is_read(ids):
    looked = trace(make_model(), ids, twin=make_model("dense"))
    twin_recall = looked.layers[0].twin_recall
    assert twin_recall is not None
    np.testing.assert_allclose(twin_recall[:32], 1, atol=1e-5)
    assert (twin_recall[40:] < 1).any()


def test_twin_attention_is_the_one_its_layers_compute(ids):
    """Values that are one-hot in position turn the twin's output into its attention."""
    twin = make_model("dense", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = make_model(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    looked = trace(model, ids, twin=twin)
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    captured = {}

    def spy(q, k, v, **options):
        captured["mass"] = sdpa(q, k, torch.eye(90).expand(1, 2, 90, 90), is_causal=True)
        return sdpa(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("nsa.layers.dense_attention.scaled_dot_product_attention", spy)
        twin(input_ids=ids[None], use_cache=False)
    mass = captured["mass"][0].transpose(0, 1)
    expected = (mass * read_mask(looked)).sum(-1)
    np.testing.assert_allclose(looked.layers[0].twin_recall, expected, atol=1e-5)


def read_mask(looked: Trace) -> torch.Tensor:
    """Tokens that the first layer's queries read, bool ``[T, K, T]``, from the definition."""
    blocks = torch.from_numpy(looked.layers[0].block_indices).long()
    position = torch.arange(looked.num_tokens)
    token = position[:, None, None]
    chosen = (position // CONFIG.block_size == blocks[..., None]).any(2)
    return (chosen | (position > token - CONFIG.window_size)) & (position <= token)


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        pytest.param(LlamaConfig, {"attention_bias": True}, id="llama"),
        pytest.param(Qwen2Config, {}, id="qwen2"),
        pytest.param(Qwen3Config, {"head_dim": 24}, id="qwen3"),
    ],
)
def test_twin_may_be_the_source_of_a_conversion(ids, config_class, changes):
    """Recall of its attention is what transformers' own matrices say."""
    torch.manual_seed(0)
    config = config_class(**SIZES, **changes, attn_implementation="eager")
    source = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in source.named_parameters():
            # Norms and biases that matter, and attention that is far from even.
            weight.normal_(std=0.5 if weight.dim() == 1 or ".self_attn." in name else 0.1)
    model, _ = convert_from_dense(source, config=CONFIG)
    looked = trace(model, ids, twin=source)
    with torch.no_grad():
        masses = source(input_ids=ids[None], output_attentions=True).attentions
    mass = masses[0][0].unflatten(0, (2, 2)).mean(1).transpose(0, 1)
    expected = (mass * read_mask(looked)).sum(-1)
    assert expected.min() < 0.8
    np.testing.assert_allclose(looked.layers[0].twin_recall, expected, atol=1e-5)
    # A converted model starts with the attention of its source.
    np.testing.assert_allclose(looked.layers[0].recall, expected, atol=1e-5)


def test_layers_limit_what_is_measured(ids):
    assert list(trace(make_model(), ids, layers=[1]).layers) == [1]


def test_trace_leaves_the_model_as_it_was(ids):
    model = make_model().train()
    trace(model, ids)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_averages_leave_out_queries_that_read_everything(ids):
    looked = trace(make_model(), ids)
    assert looked.choosing.tolist() == [t >= 32 for t in range(90)]
    values = np.where(looked.choosing, 0.25, 1.0)
    assert looked.mean(values) == pytest.approx(0.25)
    short = trace(make_model(), ids[:5])
    assert not short.choosing.any()
    assert short.mean(short.layers[0].overlap) == pytest.approx(1.0)
    assert trace(make_model(), ids[:1]).mean(np.array([np.nan])) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda m: trace(m, torch.zeros(2, 5, dtype=torch.long)),
            r"input_ids: expected the tokens of one text, .* got \[2, 5\]",
            id="batch",
        ),
        pytest.param(lambda m: trace(m, []), r"T > 0, got \[0\]", id="empty"),
        pytest.param(
            lambda m: trace(m, [1, 2], layers=[2]),
            "layers: expected numbers from 0 to 1, got 2",
            id="no-such-layer",
        ),
        pytest.param(
            lambda m: trace(make_model("dense"), [1, 2]),
            "model: expected a model with attention='nsa', got NSAForCausalLM",
            id="dense-model",
        ),
        pytest.param(
            lambda m: trace(m, [1, 2], twin=m),
            "twin: expected a model with attention='dense'",
            id="sparse-twin",
        ),
        pytest.param(
            lambda m: trace(m, [1, 2], twin=Qwen2ForCausalLM(WINDOWED)),
            "twin: expected full attention in every layer, got a sliding window of 9 in layer 1",
            id="windowed-twin",
        ),
        pytest.param(
            lambda m: trace(m, [1, 2], twin=make_model("dense", num_hidden_layers=1)),
            r"twin: expected \(layers, heads, kv heads\) = \(2, 4, 2\) .* got \(1, 4, 2\)",
            id="other-twin",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_model())
