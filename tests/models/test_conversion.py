"""Conversion of dense models: exact where it must be, near elsewhere, and clear refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tests.models.tokenizer import character_tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nsa import NSAConfig
from nsa.models import NSAForCausalLM, NSAModelConfig, convert_from_dense, load_model
from nsa.models.conversion import GATE_LOGIT, convert_folder, read_geometry

VOCAB = 97
GEOMETRY = NSAConfig.tiny()
# Below one compressed block, selection and window alone make up the output.
BELOW_BLOCK = GEOMETRY.compress_block_size - 1
EXACT = GEOMETRY.num_selected_blocks * GEOMETRY.block_size
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # None of these is anyone's default, so that one left behind shows.
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
TEXT = (
    "the cat sat on the mat and the dog sat on the log; then the cat saw the dog and the dog saw "
    "the cat, so the cat ran up the mat and the dog ran round the log. "
)


def llama(**changes) -> LlamaForCausalLM:
    return _random(LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})))


def qwen2(**changes) -> Qwen2ForCausalLM:
    return _random(Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **changes})))


def qwen3(**changes) -> Qwen3ForCausalLM:
    return _random(Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 16, **changes})))


def twin(**changes) -> NSAForCausalLM:
    values = {**SIZES, "attention": "dense", "v_head_dim": 6, **changes}
    return _random(NSAForCausalLM(NSAModelConfig(**values)))


def _random(model):
    """Every weight random: biases start as zeros and norms as ones, which would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def ids(length: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens[None]).logits[0]


YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("dense", "options"),
    [
        pytest.param(llama, {}, id="llama"),
        pytest.param(
            lambda: llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
            {"kv_per_branch": False},
            id="llama-biases-tied-shared-kv",
        ),
        pytest.param(lambda: llama(rope_parameters=YARN), {"compressor": "gated"}, id="llama-yarn"),
        pytest.param(qwen2, {"compressor": "linear"}, id="qwen2"),
        pytest.param(qwen3, {"compressor": "mean"}, id="qwen3"),
        pytest.param(twin, {}, id="own-twin"),
    ],
)
def test_short_text_keeps_the_dense_logits(dense, options):
    source = dense().double()
    before = {name: weight.clone() for name, weight in source.state_dict().items()}
    model, report = convert_from_dense(
        source, config=GEOMETRY, token_ids=ids(BELOW_BLOCK), **options
    )
    expected, got = logits(source, ids(BELOW_BLOCK)), logits(model, ids(BELOW_BLOCK))
    # Angles are float32 in both models; everything else is float64.
    assert (expected - got).abs().max() < 1e-4 * expected.abs().max()
    assert report.shift.max_change == (expected - got).abs().max()
    assert set(report.copied) | set(report.initialised) == set(model.state_dict())
    assert set(report.copied) == set(before)
    for name, weight in source.state_dict().items():
        assert torch.equal(weight, before[name])
        copied = model.state_dict()[name]
        for piece in copied.split(len(weight)):
            assert torch.equal(piece, weight)


def test_only_the_compressed_branch_moves_the_logits_while_selection_reads_everything():
    source = llama().double()
    longer_than_window = 100
    assert GEOMETRY.window_size < longer_than_window <= EXACT
    model, report = convert_from_dense(source, config=GEOMETRY, token_ids=ids(EXACT))
    assert report.exact_tokens == EXACT
    _close_gates(model, open_gate=1)
    expected = logits(source, ids(EXACT))
    assert (expected - logits(model, ids(EXACT))).abs().max() < 1e-4 * expected.abs().max()
    _close_gates(model, open_gate=2)
    within = GEOMETRY.window_size
    close = (expected - logits(model, ids(EXACT))).abs().amax(-1) < 1e-4 * expected.abs().max()
    assert close[:within].all()
    assert not close[within:].all()


def _close_gates(model, *, open_gate: int) -> None:
    bias = torch.full((3,), -100.0)
    bias[open_gate] = 100.0
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.gate_mlp[2].bias.copy_(bias.repeat(model.config.num_attention_heads))


def test_gates_start_constant_and_add_up():
    model, _ = convert_from_dense(qwen3(), config=GEOMETRY)
    x = torch.randn(5, SIZES["hidden_size"])
    for layer in model.model.layers:
        gates = layer.self_attn.gate_mlp(x).sigmoid().unflatten(-1, (-1, 3))
        assert torch.allclose(gates[..., 1], torch.tensor(1 / (1 + math.exp(-GATE_LOGIT))))
        assert torch.allclose(gates[..., 1] + gates[..., 2], torch.ones(()))
        assert torch.equal(gates[..., 0], gates[..., 2])


@pytest.fixture(scope="module")
def trained() -> LlamaForCausalLM:
    """A dense Llama of bytes that has learnt much of ``TEXT``, and can learn more."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.02}))
    _train(model, steps=50)
    return model.eval()


def _train(model, *, steps: int, lr: float = 3e-3) -> None:
    data = torch.tensor(list((TEXT * 8).encode()))
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(data) - 96, (8,), generator=generator)
        batch = torch.stack([data[start : start + 96] for start in starts])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _tokens() -> torch.Tensor:
    return torch.tensor(list(TEXT.encode()))[:EXACT]


def _loss(model) -> torch.Tensor:
    tokens = _tokens()[None]
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def test_a_trained_llama_keeps_its_loss_and_goes_on_learning(trained):
    source = copy.deepcopy(trained).double()
    model, report = convert_from_dense(source, config=GEOMETRY, token_ids=_tokens())
    shift = report.shift
    assert shift.loss_before == pytest.approx(_loss(source).item())
    counts = _tokens().bincount().double()
    unigram = torch.distributions.Categorical(counts).entropy().item()
    assert shift.loss_before < 0.7 * unigram, "the dense model has learnt the text"
    # Up to EXACT tokens, with g = sigmoid(-c), attention is (1-g) o_dense + g o_cmp + g o_win. To
    # first order the loss moves by g dL/dg, and a gate's logit has gradient g (1-g) dL/dgate.
    loss = _loss(model)
    assert shift.loss_after == pytest.approx(loss.item())
    loss.backward()
    grads = sum(
        layer.self_attn.gate_mlp[2].bias.grad.view(-1, 3).sum(0) for layer in model.model.layers
    )
    predicted = ((grads[0] + grads[2] - grads[1]) * (1 + math.exp(-GATE_LOGIT))).item()
    moved = shift.loss_after - shift.loss_before
    assert abs(moved - predicted) < 0.1 * abs(predicted)
    assert abs(moved) < 1e-3
    assert 0 < shift.kl < 1e-3
    assert 0 < shift.mean_change < shift.max_change
    model.zero_grad()
    model.float()
    _train(model, steps=10, lr=1e-3)
    assert _loss(model.eval()).item() < shift.loss_after


@pytest.mark.parametrize(
    "dense",
    [
        pytest.param(llama, id="llama"),
        pytest.param(lambda: llama(tie_word_embeddings=True), id="llama-tied"),
        pytest.param(qwen2, id="qwen2-biases"),
        pytest.param(qwen3, id="qwen3-norms"),
    ],
)
def test_a_folder_converts_into_a_folder(tmp_path, dense):
    source = dense()
    source.generation_config.max_length = 33
    source.save_pretrained(tmp_path / "dense")
    character_tokenizer().save_pretrained(tmp_path / "dense")
    torch.manual_seed(5)
    report = convert_folder(
        tmp_path / "dense", tmp_path / "sparse", config=GEOMETRY, text="A gull. " * 9
    )
    torch.manual_seed(5)
    model, _ = convert_from_dense(tmp_path / "dense", config=GEOMETRY)
    again, tokenizer = load_model(tmp_path / "sparse")
    assert report.shift.num_tokens == len(tokenizer("A gull. " * 9)["input_ids"])
    assert isinstance(again, NSAForCausalLM)
    assert again.config.geometry == GEOMETRY
    assert again.generation_config.max_length == 33
    short = ids(BELOW_BLOCK)
    torch.testing.assert_close(logits(again, short), logits(source, short), atol=1e-3, rtol=1e-3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert torch.equal(logits(model, ids(50)), logits(again, ids(50)))
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_folder_needs_no_tokenizer_to_convert_in_python(tmp_path):
    source = llama()
    source.save_pretrained(tmp_path)
    model, _ = convert_from_dense(str(tmp_path), config=GEOMETRY)
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)


def test_generates_what_the_dense_model_generates():
    source = qwen2(eos_token_id=None).double()
    model, _ = convert_from_dense(source, config=GEOMETRY)
    prompt = ids(8)[None]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": BELOW_BLOCK - 8}
    assert torch.equal(model.generate(prompt, **options), source.generate(prompt, **options))


def test_bfloat16_stays_bfloat16():
    model, _ = convert_from_dense(llama().bfloat16(), config=GEOMETRY)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not model.training


def test_a_source_in_training_stays_in_training():
    source = llama().train()
    convert_from_dense(source, config=GEOMETRY)
    assert source.training


def test_unknown_architecture():
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    known = "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, NSAForCausalLM"
    with pytest.raises(ValueError, match=f"one of {known}, got GPT2LMHeadModel .*'gpt2'"):
        convert_from_dense(gpt)
    with pytest.raises(ValueError, match=r"source: expected one of .*, got LlamaModel"):
        convert_from_dense(LlamaModel(LlamaConfig(**SIZES)))


def _with_extra_weight() -> LlamaForCausalLM:
    model = llama()
    model.model.layers[1].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.zeros(4)))
    return model


def _with_integer_weight() -> LlamaForCausalLM:
    model = llama()
    weight = torch.zeros(VOCAB, 32, dtype=torch.int8)
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


def _with_other_shape() -> LlamaForCausalLM:
    model = llama()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 16))
    return model


def _with_wide_keys() -> LlamaForCausalLM:
    """As many rows as the keys of three branches have."""
    model = llama()
    model.model.layers[0].self_attn.k_proj.weight = torch.nn.Parameter(torch.zeros(48, 32))
    return model


def _capped() -> LlamaForCausalLM:
    model = llama()
    model.config.final_logit_softcapping = 30.0
    return model


def _rotated_by_length() -> LlamaForCausalLM:
    return llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})


def _partly_rotated() -> LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    return llama(rope_parameters=rope)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(
            lambda: qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1),
            "layer_types: expected full_attention in every layer, got sliding_attention in layer 1",
            id="sliding-window",
        ),
        pytest.param(
            lambda: twin(attention="nsa"), "got nsa_attention in layer 0", id="sparse-already"
        ),
        pytest.param(
            lambda: llama(attention_dropout=0.1), "attention_dropout: expected 0", id="dropout"
        ),
        pytest.param(_capped, r"final_logit_softcapping: expected none.*30\.0", id="soft-capping"),
        pytest.param(_partly_rotated, "partial_rotary_factor: expected 1", id="partial-rotary"),
        pytest.param(_rotated_by_length, "rope_type: expected .*got 'dynamic'", id="dynamic-rope"),
        pytest.param(
            lambda: llama(num_attention_heads=4, num_key_value_heads=3),
            "num_key_value_heads: expected a divisor of num_attention_heads = 4, got 3",
            id="heads",
        ),
        pytest.param(
            _with_extra_weight, r"got 1 others \(model\.layers\.1\.self_attn\.sinks", id="extra"
        ),
        pytest.param(
            _with_integer_weight, "lm_head.weight: expected floating-point weights", id="quantised"
        ),
        pytest.param(
            _with_wide_keys,
            r"k_proj.weight: expected \[16, 32\] by the config, got \[48, 32\]",
            id="shape-of-keys",
        ),
        pytest.param(
            _with_other_shape, r"lm_head.weight: expected \[97, 32\].*got \[97, 16\]", id="shape"
        ),
    ],
)
def test_what_cannot_be_represented(source, message):
    with pytest.raises(ValueError, match=message):
        convert_from_dense(source(), config=GEOMETRY)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        pytest.param(ids(1), r"int64 \[seq\] of 2 to 256 tokens, got torch.int64 \[1\]", id="one"),
        pytest.param(ids(257), r"got torch.int64 \[257\]", id="long"),
        pytest.param(ids(4)[None], r"got torch.int64 \[1, 4\]", id="rank"),
        pytest.param(ids(4).int(), "got torch.int32", id="dtype"),
        pytest.param(ids(4) + VOCAB, "ids from 0 to 96, got", id="range"),
    ],
)
def test_bad_token_ids(token_ids, message):
    with pytest.raises(ValueError, match=f"token_ids: expected .*{message}"):
        convert_from_dense(llama(), config=GEOMETRY, token_ids=token_ids)


def test_bad_folders(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config.json and weights"):
        convert_from_dense(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"output: expected a new folder, but .* exists"):
        convert_folder(tmp_path / "nothing", tmp_path)


@pytest.mark.parametrize(("text", "num_tokens"), [("", 0), ("a", 1)], ids=["empty", "one"])
def test_a_text_without_two_tokens_is_named(tmp_path, text, num_tokens):
    llama().save_pretrained(tmp_path / "dense")
    character_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=f"^text: expected at least 2 tokens.* got {num_tokens}"):
        convert_folder(tmp_path / "dense", tmp_path / "sparse", config=GEOMETRY, text=text)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(OSError("No space left on device"), id="system"),
        # What safetensors makes of a full disk is no OSError.
        pytest.param(SafetensorError("I/O error: No space left on device"), id="safetensors"),
        pytest.param(Exception("No space left on device"), id="tokenizers"),
    ],
)
def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch, error):
    llama().save_pretrained(tmp_path / "dense")
    character_tokenizer().save_pretrained(tmp_path / "dense")

    def full(self, folder):
        Path(folder).mkdir()
        raise error

    monkeypatch.setattr(NSAForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match=r"output: could not write .*sparse .*No space left.*nothing"):
        convert_folder(tmp_path / "dense", tmp_path / "sparse", config=GEOMETRY)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_geometry_from_strings():
    assert read_geometry([]) == NSAConfig.paper()
    assert read_geometry(["window_size=8", "window_size=9"]) == NSAConfig(window_size=9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("window=9", "--set: expected key=value with a key of compress", id="key"),
        pytest.param("window_size", "got 'window_size'", id="no-value"),
        pytest.param("window_size=-9", "window_size: expected a whole number, got '-9'", id="sign"),
        pytest.param("window_size=0", "window_size: expected at least 1, got 0", id="range"),
    ],
)
def test_bad_geometry(override, message):
    with pytest.raises(ValueError, match=message):
        read_geometry([override])
