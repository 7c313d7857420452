"""The model: loss, packing, padding, its dense twin, checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.models.small import (
    DEVICES,
    VOCAB,
    left_padded,
    random_ids,
    small_config,
    small_model,
)
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    LlamaConfig,
    Qwen3Config,
)

from nsa import ops
from nsa.models import NSAForCausalLM, NSAModel

KINDS = pytest.mark.parametrize("attention", ["nsa", "dense"])
LENGTHS = [5, 41, 1, 23]


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def grads(model: torch.nn.Module) -> list[torch.Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    assert all(g is not None for g in found)
    return found


def checkpoint(model: NSAForCausalLM) -> None:
    """By its new name where transformers has it; the old one warns there."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)()


@KINDS
def test_registered_with_the_auto_classes(attention):
    config = small_config(attention=attention)
    assert type(AutoModelForCausalLM.from_config(config)) is NSAForCausalLM
    assert type(AutoModel.from_config(config)) is NSAModel
    # transformers' own would shard the sequence under attention that must choose blocks from it.
    model = NSAForCausalLM(config)
    assert not model.supports_context_parallel
    assert not model.supports_tp_plan
    assert not model.supports_pp_plan


@KINDS
def test_a_token_changes_only_what_follows(attention):
    model, ids = small_model(attention=attention), random_ids(1, 80)
    other = ids.clone()
    other[0, 50] = ids[0, 50] % (VOCAB - 1) + 1
    with torch.no_grad():
        a, b = model(ids).logits, model(other).logits
    assert torch.equal(a[:, :50], b[:, :50])
    assert (a[:, 50:] != b[:, 50:]).any(-1).all()


def test_loss_is_the_cross_entropy_of_the_next_token():
    model, ids = small_model(), random_ids(2, 30)
    labels = ids.clone()
    labels[0, :10] = -100
    out = model(ids, labels=labels)
    expected = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(out.loss, expected)
    assert out.past_key_values is None
    items = torch.tensor(100)
    total = model(ids, labels=labels, num_items_in_batch=items).loss * items
    assert torch.allclose(total, expected * (labels[:, 1:] != -100).sum())


def test_no_label_at_all():
    """As in transformers: a mean over nothing is NaN, a part of a batch that has labels is 0.

    A loss of 0 would hide that no token was learnt from; to know would wait for the GPU.
    """
    model, ids = small_model(), random_ids(1, 9)
    none = torch.full_like(ids, -100)
    assert model(ids, labels=none).loss.isnan()
    loss = model(ids, labels=none, num_items_in_batch=5).loss
    assert loss == 0
    loss.backward()
    assert not any(grad.any() for grad in grads(model))


@KINDS
def test_packed_sequences_are_separate_sequences(attention):
    model = small_model(attention=attention, dtype=torch.float64)
    ids = random_ids(1, sum(LENGTHS))
    packed = model(ids, labels=ids, cu_seqlens=bounds(LENGTHS))
    packed.loss.backward()
    packed_grads = grads(model)
    pieces = [model(piece).logits for piece in ids.split(LENGTHS, dim=1)]
    assert torch.allclose(packed.logits, torch.cat(pieces, dim=1))
    targets = [piece[0, 1:] for piece in ids.split(LENGTHS, dim=1)]
    scores = torch.cat([x[0, :-1] for x in pieces])
    loss = cross_entropy(scores.float(), torch.cat(targets))
    assert torch.allclose(packed.loss, loss)
    loss.backward()
    for a, b in zip(packed_grads, grads(model), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_attention_is_told_the_longest_packed_sequence(monkeypatch):
    """Where all fit the selection, kernels need not choose."""
    told, attend = [], ops.nsa_attention

    def listen(*tensors, **options):
        told.append(options["max_seqlen"])
        return attend(*tensors, **options)

    monkeypatch.setattr(ops, "nsa_attention", listen)
    model = small_model()
    model(random_ids(1, sum(LENGTHS)), cu_seqlens=bounds(LENGTHS))
    assert set(told) == {max(LENGTHS)}
    told.clear()
    model(random_ids(2, 30), use_cache=False)
    assert set(told) == {None}


def test_an_empty_first_sequence_hides_no_label():
    model, ids = small_model(), random_ids(1, 20)
    whole = model(ids, labels=ids, cu_seqlens=bounds([20])).loss
    assert torch.equal(model(ids, labels=ids, cu_seqlens=bounds([0, 20])).loss, whole)


@pytest.mark.parametrize("flash", [True, False], ids=["cu_seq_lens_q", "position_ids"])
@KINDS
def test_transformers_flattening_collator(attention, flash):
    model, ids = small_model(attention=attention), random_ids(1, sum(LENGTHS))
    examples = [{"input_ids": piece[0]} for piece in ids.split(LENGTHS, dim=1)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=flash)(examples)
    expected = model(ids, labels=ids, cu_seqlens=bounds(LENGTHS))
    found = model(**batch)
    assert torch.equal(found.logits, expected.logits)
    assert torch.allclose(found.loss, expected.loss)


@pytest.mark.parametrize("side", ["left", "right"])
@KINDS
def test_padding_changes_nothing(attention, side):
    model = small_model(attention=attention, dtype=torch.float64)
    rows = [random_ids(n, seed=n) for n in (50, 21, 3)]
    ids, mask = left_padded(rows)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
        ids = torch.stack([torch.nn.functional.pad(row, (0, 50 - len(row))) for row in rows])
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    assert out.logits.isfinite().all()
    for row, tokens in enumerate(rows):
        real = mask[row].bool()
        alone = model(tokens[None], output_hidden_states=True)
        assert torch.allclose(out.logits[row, real], alone.logits[0])
        for ours, theirs in zip(out.hidden_states, alone.hidden_states, strict=True):
            assert torch.allclose(ours[row, real], theirs[0])
    assert len(out.hidden_states) == 3


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
)


@pytest.mark.parametrize(
    ("changes", "config_type", "theirs"),
    [
        pytest.param({}, LlamaConfig, {}, id="llama"),
        pytest.param({"rope_parameters": {**YARN, "rope_theta": 1e4}}, LlamaConfig, {}, id="yarn"),
        pytest.param(
            {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
            LlamaConfig,
            {"attention_bias": True, "mlp_bias": True},
            id="llama-with-biases",
        ),
        pytest.param({"qk_norm": True}, Qwen3Config, {}, id="qwen3"),
    ],
)
def test_the_dense_twin_is_a_known_model(changes, config_type, theirs):
    ours = small_model(attention="dense", v_head_dim=8, **changes)
    sizes = {name: copy.copy(getattr(ours.config, name)) for name in SIZES}
    other = AutoModelForCausalLM.from_config(config_type(**sizes, **theirs)).eval()
    other.load_state_dict(ours.state_dict())
    ids, mask = left_padded([random_ids(60), random_ids(33)])
    with torch.no_grad():
        a, b = (m(ids, attention_mask=mask).logits for m in (ours, other))
    assert torch.allclose(a[mask.bool()], b[mask.bool()], atol=1e-5)
    prompt = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 30, "eos_token_id": 99}
    assert torch.equal(ours.generate(ids, **prompt), other.generate(ids, pad_token_id=0, **prompt))


def test_options_reach_the_sparse_attention():
    model = small_model(
        qk_norm=True, rms_norm_eps=1e-3, attention_bias=True, compressor="gated", num_init_blocks=0
    )
    for layer in model.model.layers:
        attention = layer.self_attn
        assert (attention.q_norm.eps, attention.k_norm.eps) == (1e-3, 1e-3)
        assert layer.input_layernorm.eps == layer.post_attention_layernorm.eps == 1e-3
        biased = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        assert all(linear.bias is not None for linear in biased)
        assert attention.compressor.kind == "gated"
        assert attention.config == model.config.geometry


def test_with_all_blocks_and_that_gate_alone_it_is_its_dense_twin():
    wide = {"num_selected_blocks": 40, "kv_per_branch": False, "dtype": torch.float64}
    sparse, dense = small_model(**wide), small_model(attention="dense", **wide)
    with torch.no_grad():
        for layer in sparse.model.layers:
            last = layer.self_attn.gate_mlp[-1]
            last.weight.zero_()
            last.bias.copy_(torch.tensor([-1e9, 1e9, -1e9]).repeat(4))
    dense.load_state_dict(
        {name: w for name, w in sparse.state_dict().items() if name in dense.state_dict()}
    )
    ids = random_ids(2, 300)
    with torch.no_grad():
        assert torch.allclose(sparse(ids).logits, dense(ids).logits)


@DEVICES
@KINDS
def test_gradient_checkpointing_gives_the_same_gradients(attention, device):
    model = small_model(attention=attention).train().to(device)
    ids = random_ids(1, sum(LENGTHS)).to(device)
    batch = {"input_ids": ids, "labels": ids, "cu_seqlens": bounds(LENGTHS).to(device)}
    model(**batch).loss.backward()
    plain = grads(model)
    checkpoint(model)
    model(**batch).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, grads(model), strict=True))
    with pytest.raises(ValueError, match="use_cache: expected False with gradient checkpointing"):
        model(ids, use_cache=True)


def test_bfloat16_weights_and_autocast():
    ids = random_ids(1, 60)
    exact = small_model(qk_norm=True)(ids, labels=ids).loss
    low = small_model(qk_norm=True, dtype=torch.bfloat16)(ids, labels=ids)
    assert low.logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = small_model(qk_norm=True)(ids, labels=ids).loss
    mixed.backward()
    assert torch.allclose(low.loss, exact, rtol=0.05)
    assert torch.allclose(mixed, exact, rtol=0.05)


def test_logits_to_keep():
    model, ids = small_model(), random_ids(2, 20)
    with torch.no_grad():
        whole = model(ids).logits
        # A product of fewer rows may sum in another order.
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
        some = torch.tensor([1, 7])
        torch.testing.assert_close(model(ids, logits_to_keep=some).logits, whole[:, some])


def test_embeddings_instead_of_ids_and_a_tuple_instead_of_a_dict():
    model, ids = small_model(), random_ids(2, 20)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        expected = model(ids, use_cache=False).logits
        assert torch.equal(model(inputs_embeds=embeds, use_cache=False).logits, expected)
        (logits,) = model(ids, use_cache=False, return_dict=False)
        assert torch.equal(logits, expected)


def test_tied_embeddings_are_one_tensor():
    model = small_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not small_model().lm_head.weight.equal(small_model().model.embed_tokens.weight)


def test_initial_weights():
    torch.manual_seed(0)
    model = NSAForCausalLM(small_config(initializer_range=0.02))
    attention = model.model.layers[0].self_attn
    assert attention.compressor.k_w2.count_nonzero() == 0
    assert attention.compressor.v_pe.count_nonzero() == 0
    assert 0.5 < attention.compressor.k_w1.std() * 64**0.5 < 1.5
    assert abs(attention.q_proj.weight.std() - 0.02) < 0.005
    assert (model.model.norm.weight == 1).all()


def test_packed_rows_may_be_longer_than_the_positions():
    lengths = [300, 300]
    out = small_model()(random_ids(1, 600), cu_seqlens=bounds(lengths))
    assert out.logits.shape == (1, 600, VOCAB)
    with pytest.raises(ValueError, match="at most 512 tokens"):
        small_model()(random_ids(1, 600), cu_seqlens=bounds([600]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param(
            "eager", "attn_implementation: expected 'sdpa' or none.*got 'eager'", id="eager"
        ),
        pytest.param("nsa", "attn_implementation=.nsa.* is not supported", id="nsa"),
        pytest.param("flash_attention_2", "does not support Flash Attention 2", id="flash"),
        pytest.param("flex_attention", "flex_attention", id="flex"),
    ],
)
def test_attention_implementations_of_transformers(name, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(small_config(), attn_implementation=name)
    assert AutoModelForCausalLM.from_config(small_config(), attn_implementation="sdpa")
