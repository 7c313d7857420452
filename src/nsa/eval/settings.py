"""What an evaluation can be told beyond which model and which text: three small sections.

Read from ``section.key=value`` strings, values as YAML; unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexitySettings:
    """Perplexity by position.

    Args:
        max_tokens: tokens read of each document, from its start; the model's positions if None.
        bin_edges: increasing positions from 1 to ``max_tokens``; doubling from 64 if None.
    """

    max_tokens: int | None = None
    bin_edges: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _at_least("perplexity.max_tokens", self.max_tokens, 2)
        if self.bin_edges is not None:
            _at_least("perplexity.bin_edges", min(self.bin_edges, default=0), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleSettings:
    """Grid of the needle test.

    Args:
        lengths: tokens of prompt and answer; a quarter, half and all of the model's positions if
            None.
        depths: where the needle is, percent of the text.
        num_keys: needles in the text; 1 is the single-needle test.
        num_digits: digits of the hidden numbers.
        num_samples: questions per cell of the grid.
        batch_size: prompts at once.
    """

    lengths: tuple[int, ...] | None = None
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    num_keys: tuple[int, ...] = (1, 4)
    num_digits: int = 7
    num_samples: int = 10
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("lengths", "depths", "num_keys"):
            values = getattr(self, name)
            if values is None:
                continue
            least = 0 if name == "depths" else 1
            _at_least(f"needle.{name}", min(values, default=least - 1), least)
            if len(set(values)) < len(values):
                raise ValueError(f"needle.{name}: expected different values, got {list(values)}.")
        if max(self.depths) > 100:
            raise ValueError(f"needle.depths: expected percentages, got {list(self.depths)}.")
        for name in ("num_digits", "num_samples", "batch_size"):
            _at_least(f"needle.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings:
    """Task suites.

    Args:
        num_fewshot: solved examples before each question; the task's own number if None.
        batch_size: requests at once.
    """

    num_fewshot: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.num_fewshot is not None:
            _at_least("tasks.num_fewshot", self.num_fewshot, 0)
        _at_least("tasks.batch_size", self.batch_size, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """All sections.

    Args:
        perplexity: perplexity by position.
        needle: needle in a haystack.
        tasks: task suites.
    """

    perplexity: PerplexitySettings = field(default_factory=PerplexitySettings)
    needle: NeedleSettings = field(default_factory=NeedleSettings)
    tasks: TaskSettings = field(default_factory=TaskSettings)

    @classmethod
    def from_overrides(cls, overrides: Sequence[str]) -> EvalSettings:
        """Reads ``section.key=value`` strings; later ones win.

        Raises:
            ValueError: an unknown key, an ill-typed value, or one out of range.

        Example:
            >>> EvalSettings.from_overrides(["needle.lengths=[1024, 4096]"]).needle.lengths
            (1024, 4096)
        """
        given: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
        for override in overrides:
            section, key, value = _split(override)
            given[section][key] = value
        return cls(**{name: _SECTIONS[name](**values) for name, values in given.items()})


_SECTIONS: dict[str, type] = {
    "perplexity": PerplexitySettings,
    "needle": NeedleSettings,
    "tasks": TaskSettings,
}
_TYPES = {
    f"{name}.{f.name}": str(f.type)
    for name, section in _SECTIONS.items()
    for f in dataclasses.fields(section)
}


def _split(override: str) -> tuple[str, str, Any]:
    name, equals, text = (part.strip() for part in override.partition("="))
    if not equals:
        raise ValueError(
            f"--set: expected section.key=value, such as needle.num_samples=20, got {override!r}."
        )
    if name not in _TYPES:
        raise ValueError(f"--set {name}: unknown key. Known: {', '.join(_TYPES)}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {override}: the value is not YAML ({error}).") from error
    section, _, key = name.partition(".")
    return section, key, _typed(name, value, _TYPES[name])


def _typed(name: str, value: Any, wanted: str) -> Any:
    if value is None and wanted.endswith("| None"):
        return None
    if not wanted.startswith("tuple"):
        if type(value) is int:
            return value
        raise ValueError(f"--set {name}: expected a whole number, got {value!r}.")
    values = value if isinstance(value, list) else [value]
    if values and all(type(v) is int for v in values):
        return tuple(values)
    raise ValueError(f"--set {name}: expected whole numbers, such as {name}=[1, 2], got {value!r}.")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}.")
