"""The file a training run is made from: YAML in four sections, checked before anything is read.

Not transformers' TrainingArguments: a chosen set of settings, whose meaning does not depend on the
number of devices.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nsa.models.configuration import OF_TRANSFORMERS

PRECISIONS = ("auto", "bf16", "fp32")
SCHEDULES = ("cosine", "wsd")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the text is and how long a training sequence may be.

    Args:
        train: files or folders (.jsonl, .jsonl.gz/.xz/.zst, .parquet, .txt), relative to the
            current folder.
        validation: held-out files or folders; empty for none.
        text_field: field or column that holds the text.
        seq_len: tokens per packed row, and the longest sequence seen in training.
        validation_max_tokens: tokens of a held-out document that are read as one sequence; as many
            as the model has positions if None. A longer document is read in consecutive pieces.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    text_field: str = "text"
    seq_len: int
    validation_max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("data.train: expected at least one file or folder, got an empty list.")
        _at_least("data.seq_len", self.seq_len, 8)
        if self.validation_max_tokens is not None:
            _at_least("data.validation_max_tokens", self.validation_max_tokens, 2)
            if not self.validation:
                raise _validates_nothing("data.validation_max_tokens", self.validation_max_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Either a tokenizer to load, or the size of one to train on ``data.train``.

    Args:
        load: folder with ``tokenizer.json``, or a name on the Hugging Face Hub.
        vocab_size: tokens of the byte-level BPE to train.
    """

    load: str | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if (self.load is None) == (self.vocab_size is None):
            raise ValueError(
                "tokenizer: expected exactly one of tokenizer.load (use an existing one) and "
                "tokenizer.vocab_size (train one), got "
                f"load={self.load!r} and vocab_size={self.vocab_size!r}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """The optimisation and the run around it.

    Args:
        output_dir: folder of the run: resolved config, tokenizer, checkpoints, logs and the final
            model.
        initial_model: folder of a model of this package, such as ``nsa convert`` writes, whose
            weights and settings the run starts from; random weights if None.
        max_steps: optimizer steps.
        batch_rows: packed rows per optimizer step, over all devices and accumulation.
        micro_batch_rows: rows one device computes at a time. Gradients are accumulated over
            ``batch_rows / (micro_batch_rows * devices)`` micro-batches.
        learning_rate: peak learning rate.
        schedule: ``"cosine"``, or ``"wsd"`` (warm up, stay, decay).
        warmup_steps: steps of linear warm-up, from 0 (cosine) or the final rate (wsd).
        decay_steps: steps of the final decay (wsd only, where it is required).
        min_lr_ratio: learning rate at the end, as a share of the peak.
        weight_decay: of AdamW, not applied to norms and biases.
        beta1: first-moment decay of AdamW.
        beta2: second-moment decay of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        precision: ``"bf16"`` (autocast, float32 weights), ``"fp32"``, or ``"auto"``: bf16 on a GPU.
        gradient_checkpointing: recompute each layer in the backward pass, to save memory.
        recompute_branches: keep of sparse attention only its inputs, the lists of blocks and the
            log-sum-exps, and compute the branch outputs again in the backward pass, to save memory.
            Dense attention keeps none, so its models train as without.
        compile: compile the model with ``torch.compile``, on one GPU into CUDA graphs. It takes a
            minute at the start, after which layers no longer wait for the host.
        fsdp: shard weights and optimizer over devices with FSDP2; otherwise several devices run
            DDP.
        seed: of the initial weights and the order of the data.
        log_every: steps between logged losses.
        save_every: steps between checkpoints.
        keep_checkpoints: checkpoints kept, the newest ones.
        eval_every: steps between validation losses; 0 for only at the end.
        num_workers: processes that prepare batches; 0 for the training process itself.
    """

    output_dir: str
    initial_model: str | None = None
    max_steps: int
    batch_rows: int = 8
    micro_batch_rows: int = 1
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    recompute_branches: bool = False
    compile: bool = False
    fsdp: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2
    eval_every: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_rows", "micro_batch_rows", "log_every", "save_every"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        _at_least("training.keep_checkpoints", self.keep_checkpoints, 1)
        for name in ("warmup_steps", "eval_every", "num_workers", "weight_decay"):
            _at_least(f"training.{name}", getattr(self, name), 0)
        _within("training.seed", self.seed, least=0, most=2**32 - 1)  # NumPy takes no more
        for name in ("learning_rate", "max_grad_norm"):
            _within(f"training.{name}", getattr(self, name), above=0.0)
        for name in ("beta1", "beta2", "min_lr_ratio"):
            _within(f"training.{name}", getattr(self, name), least=0.0, most=1.0)
        _one_of("training.precision", self.precision, PRECISIONS)
        _one_of("training.schedule", self.schedule, SCHEDULES)
        if (self.decay_steps is None) == (self.schedule == "wsd"):
            raise ValueError(
                "training.decay_steps: expected with schedule wsd and only there, got "
                f"schedule={self.schedule!r} and decay_steps={self.decay_steps!r}."
            )
        if self.decay_steps is not None:
            _at_least("training.decay_steps", self.decay_steps, 1)
        busy = self.warmup_steps + (self.decay_steps or 0)
        if busy > self.max_steps:
            raise ValueError(
                f"training.max_steps: expected at least warmup_steps + decay_steps = {busy}, "
                f"got {self.max_steps}."
            )

    def accumulation_steps(self, num_devices: int) -> int:
        """Micro-batches per optimizer step on each of ``num_devices`` devices.

        Raises:
            ValueError: the batch cannot be dealt out evenly.
        """
        share = self.micro_batch_rows * num_devices
        if self.batch_rows % share:
            raise ValueError(
                f"training.batch_rows: expected a multiple of micro_batch_rows * devices = "
                f"{self.micro_batch_rows} * {num_devices} = {share}, got {self.batch_rows}."
            )
        return self.batch_rows // share


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole run.

    Args:
        model: fields of ``NSAModelConfig``; ``vocab_size`` is the tokenizer's if it is not given.
        data: section ``data``.
        tokenizer: section ``tokenizer``.
        training: section ``training``.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    data: DataConfig
    tokenizer: TokenizerConfig
    training: LoopConfig

    def __post_init__(self) -> None:
        if self.training.eval_every and not self.data.validation:
            raise _validates_nothing("training.eval_every", self.training.eval_every)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Builds and checks a config from nested mappings, as YAML gives them.

        Raises:
            ValueError: an unknown, missing or ill-typed key, or values that do not fit together.
        """
        sections = _known_keys("", values, cls)
        model = sections.get("model") or {}
        if not isinstance(model, Mapping) or not all(isinstance(name, str) for name in model):
            raise ValueError(f"model: expected a mapping of settings, got {model!r}.")
        without_effect = OF_TRANSFORMERS & model.keys()
        if without_effect:
            raise ValueError(
                f"model.{min(without_effect)}: expected a setting of the model, got one of "
                "transformers, which changes nothing in a run. Leave it out; for another dtype, "
                "set training.precision."
            )
        return cls(
            model=dict(model),
            data=_section("data", sections, DataConfig),
            tokenizer=_section("tokenizer", sections, TokenizerConfig),
            training=_section("training", sections, LoopConfig),
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, every default filled in."""
        values = dataclasses.asdict(self)
        for name in ("train", "validation"):
            values["data"][name] = list(values["data"][name])
        return values

    def to_yaml(self) -> str:
        """The resolved config, in the format it is read from."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML config and applies ``section.key=value`` overrides.

    Args:
        path: the file.
        overrides: such as ``"training.max_steps=100"``; values are read as YAML. Later ones win.

    Returns:
        The checked config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or see :meth:`TrainConfig.from_dict`.

    Example:
        >>> load_config("configs/tiny-cpu.yaml", ["training.max_steps=20"]).training.max_steps
        20
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: no such file: {path} (looked from {Path.cwd()}).")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a YAML file ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected sections model, data, tokenizer, training.")
    for override in overrides:
        _apply(values, override)
    return TrainConfig.from_dict(values)


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    section, dot, key = dotted.strip().partition(".")
    if not (equals and dot and section and key):
        raise ValueError(
            f"--set: expected section.key=value, such as training.max_steps=100, got {override!r}."
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {override}: the value is not YAML ({error}).") from error
    target = values.setdefault(section, {})
    *parents, last = key.split(".")
    for parent in parents:
        target = target.setdefault(parent, {}) if isinstance(target, dict) else target
    if not isinstance(target, dict):
        raise ValueError(f"--set {override}: {section} is not a section with keys.")
    target[last] = value


def _section(name: str, sections: Mapping[str, Any], cls: type) -> Any:
    given = sections.get(name)
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}: expected a section with settings, got {given!r}.")
    known = _known_keys(f"{name}.", given, cls)
    hints = typing.get_type_hints(cls)
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in known
    ]
    if missing:
        raise ValueError(f"{name}: expected a value for {', '.join(missing)}, got none.")
    return cls(**{key: _typed(f"{name}.{key}", value, hints[key]) for key, value in known.items()})


def _known_keys(prefix: str, values: Mapping[str, Any], cls: type) -> Mapping[str, Any]:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"{prefix}{key}: unknown key. Known: {', '.join(known)}.")
    return values


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as the annotated type, allowing only what YAML cannot write directly."""
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in accepted:
        return None
    wanted = next(a for a in accepted if a is not type(None))
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ValueError(f"{name}: expected a list of strings, got {value!r}.")
    if wanted is float and isinstance(value, str | int) and not isinstance(value, bool):
        # YAML 1.1 reads 3e-4, which has no dot, as a string.
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not wanted:
        raise ValueError(
            f"{name}: expected {wanted.__name__}, got {value!r} ({type(value).__name__})."
        )
    return value


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name}: expected at least {least}, got {value}.")


def _within(
    name: str,
    value: float,
    *,
    above: float | None = None,
    least: float = float("-inf"),
    most: float = float("inf"),
) -> None:
    if above is not None and not above < value < float("inf"):
        raise ValueError(f"{name}: expected a number above {above}, got {value}.")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected a number from {least} to {most}, got {value}.")


def _validates_nothing(name: str, value: int) -> ValueError:
    return ValueError(
        f"{name}: expected with data.validation only, got {value} and no held-out files. Set "
        "data.validation, or leave it out."
    )


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}.")
