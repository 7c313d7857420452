"""Checkpoints: round trip, and every kind of damage with its own error."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.disk import cut_to_half
from tests.models.small import random_ids, small_config, small_model
from tests.models.tokenizer import character_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, pipeline

from nsa.models import NSAForCausalLM, load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_model().save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="nsa"),
        pytest.param({"attention": "dense"}, id="dense"),
        pytest.param({"tie_word_embeddings": True, "qk_norm": True}, id="tied-qk-norm"),
        pytest.param({"compressor": "mean", "kv_per_branch": False}, id="mean-shared"),
        pytest.param({"compressor": "linear", "attention_bias": True}, id="linear-bias"),
    ],
)
def test_saved_and_loaded_models_are_bit_equal(tmp_path, changes):
    model, ids = small_model(**changes), random_ids(1, 70)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is NSAForCausalLM
    for (name, a), (other, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_loads_model_and_tokenizer(folder):
    model, tokenizer = load_model(folder)
    assert not model.training
    assert tokenizer.decode(tokenizer("Hi there.").input_ids) == "H i   t h e r e ."
    low, _ = load_model(str(folder), dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert low.model.rotary_emb.inv_freq.dtype == torch.float32


def test_loads_dense_models_of_transformers(folder):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    assert isinstance(load_model(folder)[0], LlamaForCausalLM)


def test_shards(folder):
    small_model().save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    expected = small_model().state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in load_model(folder)[0].state_dict().items())
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"expected weights in .*{shards[1].name}"):
        load_model(folder)


def test_pipeline(folder):
    model, tokenizer = load_model(folder)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    prompts = ["Once upon a time there was", "a cat"]
    alone = [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert all(alone)
    together = generate(prompts, batch_size=2, **options)
    assert [x[0]["generated_text"] for x in together] == alone


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_no_such_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"model: expected a folder .*found none at .*nowhere"
    ):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer"])
def test_a_missing_file(folder, name):
    for file in folder.glob(f"{name}*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=name.split(".")[0]):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 300, -1], ids=["empty", "header", "weights", "last-byte"])
def test_weights_cut_short(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors: expected a whole .*cut short"):
        load_model(folder)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_a_file_cut_to_half_its_size(folder, name):
    (folder / "model.safetensors").unlink()
    small_model().save_pretrained(folder, max_shard_size="60KB")
    cut_to_half(folder / name)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: expected .*cut short.*opy"):
        load_model(folder)


def test_a_tokenizer_of_which_a_file_is_missing(folder):
    (folder / "tokenizer.json").unlink()
    message = r"tokenizer: expected a folder with .*, which cannot be read \(.*\)\. Copy its files"
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"hidden_size": 40}, "of another shape", id="width"),
        pytest.param({"num_hidden_layers": 3}, r"missing \(model.layers.2", id="more-layers"),
        pytest.param({"num_hidden_layers": 1}, r"unknown \(model.layers.1", id="fewer-layers"),
        pytest.param({"attention": "dense"}, "unknown", id="dense"),
        pytest.param({"compressor": "gated"}, "of another shape", id="compressor"),
        pytest.param({"compress_block_size": 4}, "of another shape", id="geometry"),
    ],
)
def test_weights_of_another_config(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(
        ValueError, match=f"expected the weights that config.json describes.*{message}"
    ):
        load_model(folder)


def test_a_config_that_cannot_be(folder):
    change_config(folder, compress_stride=3)
    with pytest.raises(ValueError, match="expected a multiple of compress_stride = 3"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_weights_that_are_not_finite(folder, value):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda weights: weights[name][3].fill_(value))
    with pytest.raises(
        ValueError, match=f"expected finite weights, but {name} has NaN or infinity"
    ):
        load_model(folder)


def test_a_tokenizer_of_another_model(folder):
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(40)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"expected a tokenizer of at most 97 tokens.*got 1"):
        load_model(folder)


def test_unknown_keys_in_from_pretrained_config(folder):
    assert small_config().to_dict().keys() >= {"window_size", "attention"}
    change_config(folder, moba_topk=3)
    with pytest.raises(ValueError, match="unknown key 'moba_topk'"):
        load_model(folder)
