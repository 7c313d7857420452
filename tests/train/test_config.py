"""Configs: every default resolved, every mistake named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.train import tiny

from nsa.models import NSAModelConfig
from nsa.train.config import LoopConfig, TrainConfig, load_config

EXAMPLES = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))


def _values() -> dict[str, Any]:
    return tiny.settings(Path("corpus"), Path("run"))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    config = TrainConfig.from_dict(_values())
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert yaml.safe_load(path.read_text())["training"]["beta2"] == 0.95


def test_overrides_are_yaml_and_the_last_wins(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(_values()))
    config = load_config(
        path,
        [
            "training.learning_rate=3e-4",
            "training.max_steps=10",
            "training.max_steps=20",
            "data.train=[a.txt, b]",
            "model.rope_parameters.rope_type=yarn",
            "data.validation_max_tokens=null",
        ],
    )
    assert config.training.learning_rate == 3e-4
    assert config.training.max_steps == 20
    assert config.data.train == ("a.txt", "b")
    assert config.model["rope_parameters"] == {"rope_type": "yarn"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    config = load_config(path)
    NSAModelConfig(**config.model)
    config.training.accumulation_steps(1)


def test_there_are_examples() -> None:
    assert {"tiny-cpu", "100m-16k"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        pytest.param(None, {"optimizer": {}}, r"^optimizer: unknown key\. Known: model", id="top"),
        pytest.param(
            "training", {"lr": 1}, r"training\.lr: unknown key\. Known: output_dir", id="unknown"
        ),
        pytest.param(
            "training",
            {"max_steps": "ten"},
            r"max_steps: expected int, got 'ten' \(str\)",
            id="str",
        ),
        pytest.param("training", {"max_steps": True}, r"expected int, got True", id="bool-as-int"),
        pytest.param("training", {"max_steps": 0}, r"max_steps: expected at least 1", id="zero"),
        pytest.param("training", {"seed": 2**32}, r"seed: .* from 0 to 4294967295", id="seed"),
        pytest.param("training", {"fsdp": 1}, r"fsdp: expected bool, got 1", id="int-as-bool"),
        pytest.param(
            "training", {"learning_rate": "fast"}, r"learning_rate: expected float", id="float"
        ),
        pytest.param(
            "training", {"learning_rate": 0}, r"rate: expected a number above 0\.0", id="lr-zero"
        ),
        pytest.param(
            "training", {"learning_rate": float("nan")}, r"above 0\.0, got nan", id="lr-nan"
        ),
        pytest.param(
            "training", {"weight_decay": float("nan")}, r"decay: expected at least 0", id="wd-nan"
        ),
        pytest.param("training", {"beta1": 1.5}, r"beta1: .* from 0\.0 to 1\.0", id="beta"),
        pytest.param(
            "training", {"precision": "fp8"}, r"precision: expected one of auto, bf16", id="fp8"
        ),
        pytest.param(
            "training", {"schedule": "linear"}, r"schedule: expected one of cosine, wsd", id="sched"
        ),
        pytest.param(
            "training", {"schedule": "wsd"}, r"decay_steps: expected with schedule wsd", id="wsd"
        ),
        pytest.param(
            "training", {"decay_steps": 2}, r"with schedule wsd and only there", id="cosine-decay"
        ),
        pytest.param(
            "training",
            {"schedule": "wsd", "decay_steps": 5},
            r"max_steps: expected at least warmup_steps \+ decay_steps = 7, got 6",
            id="too-short",
        ),
        pytest.param("data", {"train": []}, r"data\.train: expected at least one", id="no-data"),
        pytest.param("data", {"train": "a.txt"}, r"expected a list of strings", id="no-list"),
        pytest.param("data", {"seq_len": 4}, r"data\.seq_len: expected at least 8", id="seq-len"),
        pytest.param(
            "data", {"validation_max_tokens": 1}, r"max_tokens: expected at least 2", id="read"
        ),
        pytest.param(
            "tokenizer", {"load": "x"}, r"tokenizer: expected exactly one of", id="two-tokenizers"
        ),
        pytest.param("tokenizer", {"vocab_size": None}, r"expected exactly one of", id="none"),
        pytest.param("model", {1: 2}, r"^model: expected a mapping of settings", id="no-name"),
        pytest.param(
            "model",
            {"dtype": "bfloat16"},
            r"^model\.dtype: expected a setting of the model, .* set training\.precision\.$",
            id="dtype",
        ),
        pytest.param("model", {"id2label": "x"}, r"model\.id2label: .*Leave it out", id="label"),
        pytest.param(
            "model", {"num_labels": "x"}, r"model\.num_labels: .*Leave it out", id="labels"
        ),
    ],
)
def test_mistakes_are_named(section: str | None, change: dict[str, Any], message: str) -> None:
    values = _values()
    (values if section is None else values[section]).update(change)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    ("section", "key"), [("training", "eval_every"), ("data", "validation_max_tokens")]
)
def test_how_to_validate_without_held_out_files_is_refused(section: str, key: str) -> None:
    values = _values()
    values["training"]["eval_every"] = 0
    values["data"]["validation"] = []
    TrainConfig.from_dict(values)
    values[section][key] = 3
    with pytest.raises(ValueError, match=rf"{section}\.{key}: expected with data\.validation only"):
        TrainConfig.from_dict(values)


def test_missing_values_and_sections_are_named() -> None:
    values = _values()
    del values["data"]["seq_len"]
    with pytest.raises(ValueError, match=r"data: expected a value for seq_len, got none"):
        TrainConfig.from_dict(values)
    del values["data"]
    with pytest.raises(ValueError, match=r"data: expected a section with settings, got None"):
        TrainConfig.from_dict(values)
    with pytest.raises(ValueError, match=r"model: expected a mapping of settings, got 3"):
        TrainConfig.from_dict({**_values(), "model": 3})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("max_steps=3", r"expected section\.key=value", id="no-section"),
        pytest.param("training.max_steps", r"expected section\.key=value", id="no-value"),
        pytest.param("training.max_steps=[", r"the value is not YAML", id="not-yaml"),
        pytest.param("training.max_steps.x=1", r"is not a section with keys", id="too-deep"),
        pytest.param("training.lr=1", r"training\.lr: unknown key", id="unknown"),
    ],
)
def test_bad_overrides(override: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(_values()))
    with pytest.raises(ValueError, match=message):
        load_config(path, [override])


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config: no such file: .*none\.yaml"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "config.yaml"
    path.write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml: expected a YAML file"):
        load_config(path)
    path.write_text("- a")
    with pytest.raises(ValueError, match=r"expected sections model, data, tokenizer, training"):
        load_config(path)


def test_batch_is_dealt_out_evenly_or_refused() -> None:
    loop = LoopConfig(output_dir="x", max_steps=1, batch_rows=12, micro_batch_rows=2)
    assert [loop.accumulation_steps(n) for n in (1, 2, 3)] == [6, 3, 2]
    with pytest.raises(
        ValueError, match=r"batch_rows: .* micro_batch_rows \* devices = 2 \* 4 = 8"
    ):
        loop.accumulation_steps(4)
