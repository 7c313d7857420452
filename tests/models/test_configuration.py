"""The config: defaults, checks, and what is written to config.json."""

from __future__ import annotations

import json

import pytest
import torch
from tests.models.small import small_config
from transformers import AutoConfig, PreTrainedConfig

from nsa import NSAConfig
from nsa.models import NSAForCausalLM, NSAModelConfig


def test_geometry_is_the_papers_by_default():
    assert NSAModelConfig().geometry == NSAConfig.paper()
    assert small_config(window_size=33).geometry.window_size == 33


def test_heads_and_widths_fill_themselves_in():
    config = NSAModelConfig(hidden_size=96, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim, config.v_head_dim) == (6, 16, 16)
    assert NSAModelConfig(head_dim=20, hidden_size=50).v_head_dim == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"windowsize": 1}, "unknown key 'windowsize'. Did you mean 'window_size'", id="near"
        ),
        pytest.param({"zzz": 1}, r"unknown key 'zzz'\. Known keys: .*window_size", id="far"),
        pytest.param({"attention_dropout": 0.1}, "unknown key 'attention_dropout'", id="llamas"),
        pytest.param(
            {"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor", id="gqa"
        ),
        pytest.param(
            {"hidden_size": "32"}, "hidden_size: expected a positive int, got '32'", id="str"
        ),
        pytest.param({"vocab_size": 0}, "vocab_size: expected a positive int, got 0", id="zero"),
        pytest.param(
            {"head_dim": None, "hidden_size": 30},
            "hidden_size: expected a multiple.*= 4",
            id="head",
        ),
        pytest.param(
            {"attention": "sparse"}, "attention: expected one of nsa, dense, got", id="kind"
        ),
        pytest.param({"compressor": "max"}, "compressor: expected one of mlp, linear,", id="phi"),
        pytest.param({"qk_norm": 1}, "qk_norm: expected true or false, got 1", id="bool"),
        pytest.param(
            {"window_size": "9"}, "window_size: expected an int, got '9'", id="geometry-type"
        ),
        pytest.param(
            {"compress_block_size": 32},
            "compress_block_size: expected at most block_size",
            id="eq9",
        ),
        pytest.param(
            {"num_selected_blocks": 1}, "num_selected_blocks: expected at least", id="forced"
        ),
        pytest.param(
            {"tie_word_embeddings": "yes_please"},
            "tie_word_embeddings: expected true or false, got 'yes_please'",
            id="tie",
        ),
        pytest.param(
            {"rms_norm_eps": "small"},
            "rms_norm_eps: expected a number of at least 0, got 'small'",
            id="eps",
        ),
        pytest.param(
            {"initializer_range": -1}, "initializer_range: expected a number of at", id="range"
        ),
        pytest.param({"rms_norm_eps": True}, "rms_norm_eps: expected .* got True", id="eps-bool"),
        pytest.param({"rms_norm_eps": ".nan"}, "rms_norm_eps: expected .* '.nan'", id="eps-word"),
        pytest.param({"rms_norm_eps": "nan"}, "rms_norm_eps: expected .* got 'nan'", id="eps-nan"),
        pytest.param(
            {"hidden_act": "foo"}, "hidden_act: expected one of .*silu, .*got 'foo'", id="act"
        ),
        pytest.param(
            {"pad_token_id": "3"}, "pad_token_id: expected an int or none, got '3'", id="pad"
        ),
        pytest.param(
            {"pad_token_id": 97}, "pad_token_id: expected a token .*0 to 96.*got 97", id="pad-far"
        ),
        pytest.param({"head_dim": 15}, "head_dim: expected an even number.*got 15", id="odd-head"),
        pytest.param(
            {"bos_token_id": [3]}, r"bos_token_id: expected an int or none, got \[3\]", id="bos"
        ),
        pytest.param(
            {"eos_token_id": [3, "4"]}, "eos_token_id: expected an int, a list of them", id="eos"
        ),
        pytest.param(
            {"rope_parameters": 3}, "rope_parameters: expected a mapping with .*got 3", id="rope"
        ),
        pytest.param(
            {"rope_scaling": [3]}, r"rope_parameters: expected a mapping .*\[3\]", id="rope-old"
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "spiral"}},
            "rope_type: expected one of default, linear, .*got 'spiral'",
            id="rope-type",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_type: .*\['yarn'\]", id="rope-list"
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters.factor: expected a positive number with rope_type 'yarn', got none",
            id="yarn",
        ),
        pytest.param(
            {"rope_parameters": {"type": "llama3", "factor": 2}},
            "rope_parameters.low_freq_factor: expected a positive number with rope_type 'llama3'",
            id="llama3",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "linear", "factor": "four"}},
            "rope_parameters.factor: expected a positive number, got 'four'",
            id="factor",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": "maybe"}},
            "rope_parameters.truncate: expected true or false, got 'maybe'",
            id="truncate",
        ),
        pytest.param(
            {"rope_theta": 0}, "rope_parameters.rope_theta: expected a positive number", id="theta"
        ),
        pytest.param(
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "attention": "dense"},
            "rope_parameters.full_attention: expected a positive number",
            id="rope-per-layer-type",
        ),
        pytest.param(
            {"partial_rotary_factor": 2.0}, "partial_rotary_factor: expected at most 1", id="part"
        ),
        pytest.param(
            {"dtype": "foo"}, "^dtype: expected a floating dtype .* or none, got 'foo'", id="dtype"
        ),
        pytest.param({"torch_dtype": "nn"}, "^dtype: expected .* got 'nn'", id="dtype-older-name"),
        pytest.param({"dtype": 3}, "^dtype: expected .* got 3", id="dtype-int"),
        pytest.param({"dtype": torch.int8}, r"^dtype: expected .* got torch\.int8", id="int8"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_what_odd_heads_and_older_files_may_say():
    rope = {"rope_type": "default", "partial_rotary_factor": 0.4}
    assert small_config(head_dim=15, rope_parameters=rope).head_dim == 15
    assert small_config(pad_token_id=-1).pad_token_id is None


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16])
def test_dtypes_by_name_and_by_value(name, value):
    assert small_config(**{name: value}).dtype == torch.bfloat16


def test_numbers_in_strings_as_yaml_reads_them(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": "1e6", "factor": "4"}
    config = small_config(rms_norm_eps="1e-6", initializer_range="2e-2", rope_parameters=rope)
    assert (config.rms_norm_eps, config.initializer_range) == (1e-6, 0.02)
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
    assert rope["rope_theta"] == "1e6"
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rms_norm_eps"] == 1e-6


def test_a_value_spoilt_later_is_not_written(tmp_path):
    config = small_config()
    config.window_size = 0
    with pytest.raises(ValueError, match="window_size: expected at least 1, got 0"):
        config.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="window_size: expected at least 1, got 0"):
        NSAForCausalLM(config)


def test_rope_parameters_set_later_are_completed_by_the_model():
    config = small_config()
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0}
    rope = NSAForCausalLM(config).config.rope_parameters
    assert (rope["rope_theta"], rope["original_max_position_embeddings"]) == (1e4, 512)


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_layer_types_follow_attention_and_stay_out_of_the_file(tmp_path, attention):
    config = small_config(attention=attention)
    kind = {"nsa": "nsa_attention", "dense": "full_attention"}[attention]
    assert config.layer_types == [kind, kind]
    with pytest.raises(AttributeError):
        config.layer_types = ["full_attention"] * 2
    config.save_pretrained(tmp_path)
    assert "layer_types" not in json.loads((tmp_path / "config.json").read_text())
    # Trainer reads the file as the base class when it resumes.
    assert PreTrainedConfig.from_pretrained(tmp_path).window_size == 10


def test_file_round_trip(tmp_path):
    config = small_config(
        compressor="gated",
        kv_per_branch=False,
        rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0},
        bos_token_id=3,
        eos_token_id=[4, 5],
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, NSAModelConfig)
    again.name_or_path = ""
    assert again.to_dict() == config.to_dict() | {
        "transformers_version": again.transformers_version
    }
    assert NSAModelConfig(**again.to_dict()).to_diff_dict() == again.to_diff_dict()


def test_a_key_added_to_the_file_is_an_error(tmp_path):
    small_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sliding_window": 5}))
    with pytest.raises(ValueError, match="unknown key 'sliding_window'"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_file_with_the_older_rope_scaling(tmp_path):
    small_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["rope_parameters"]
    scaling = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}
    file.write_text(json.dumps(values | scaling))
    rope = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 5e5)


def test_rope_theta_alone():
    assert small_config(rope_theta=5e5).rope_parameters == {
        "rope_type": "default",
        "rope_theta": 5e5,
    }
