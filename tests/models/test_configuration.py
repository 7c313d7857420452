"""The config: defaults, checks, and what is written to config.json."""

from __future__ import annotations

import json

import pytest
from tests.models.small import small_config
from transformers import AutoConfig, PreTrainedConfig

from nsa import NSAConfig
from nsa.models import NSAModelConfig


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
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_a_value_spoilt_later_is_not_written(tmp_path):
    config = small_config()
    config.window_size = 0
    with pytest.raises(ValueError, match="window_size: expected at least 1, got 0"):
        config.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


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


def test_rope_theta_alone():
    assert small_config(rope_theta=5e5).rope_parameters == {
        "rope_type": "default",
        "rope_theta": 5e5,
    }
