"""Well-known tasks from files in a folder: for machines without a network, and for repeatability.

The tasks are defined in ``local_tasks.yaml``. An item of a multiple-choice file has ``query``,
``choices`` and ``gold`` (index from 0); the other fields can be read off the definitions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from jinja2 import UndefinedError

from nsa.train.documents import SUFFIXES, read_records

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

_Splits = dict[str, list[dict[str, Any]]]
_FILE_SUFFIXES = tuple(s for s in SUFFIXES if s.startswith(".jsonl"))


class LocalTask(NamedTuple):
    """A task ready for lm-eval and the files it reads."""

    task: Task | Group
    files: dict[str, Path]


@functools.cache
def local_definitions() -> Mapping[str, Mapping[str, Any]]:
    """The content of ``local_tasks.yaml``: definition by task name."""
    text = resources.files("nsa.eval").joinpath("local_tasks.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def local_task(name: str, folder: Path, *, num_fewshot: int | None) -> LocalTask:
    """Builds a task from its file in ``folder``.

    Args:
        name: a key of :func:`local_definitions`.
        folder: where the files are.
        num_fewshot: solved examples before each question; the task's own number if None.

    Returns:
        The task, or a group of tasks whose scores are averaged over all questions.

    Raises:
        FileNotFoundError: the folder or the file is not there.
        ValueError: a file cannot be read, is empty, or an item lacks a field.
        ImportError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.group import Group
        from lm_eval.config.group import AggMetricConfig
    except ImportError as error:
        raise ImportError(
            'task suites need lm-eval: pip install "native-sparse-attention[eval]"'
        ) from error
    definition = dict(local_definitions()[name])
    shots = definition.get("num_fewshot", 0) if num_fewshot is None else num_fewshot
    files = {
        split: _find(name, stem, folder)
        for split, stem in definition.pop("files").items()
        if split == "test" or shots
    }
    splits = {split: _items(path) for split, path in files.items()}
    split_by = definition.pop("split_by", None)
    definition |= {
        "test_split": "test",
        "fewshot_split": "fewshot" if "fewshot" in files else "test",
        "num_fewshot": shots,
    }
    if split_by is None:
        return LocalTask(_build(definition | {"task": name}, splits, files), files)
    group = Group(
        name,
        aggregate_metric_list=[AggMetricConfig(m["metric"]) for m in definition["metric_list"]],
    )
    for value in _values(files["test"], splits["test"], split_by):
        chosen = {
            split: [item for item in items if item.get(split_by) == value]
            for split, items in splits.items()
        }
        if not all(chosen.values()):
            raise ValueError(
                f"{files['fewshot']}: expected solved examples with {split_by}={value!r}, got none."
            )
        member = {
            "task": f"{name}_{value}",
            "description": definition["description"].format(value=value.replace("_", " ")),
        }
        group.add(_build(definition | member, chosen, files))
    return LocalTask(group, files)


def _build(definition: dict[str, Any], splits: _Splits, files: dict[str, Path]) -> Task:
    from lm_eval.api.task import ConfigurableTask

    try:
        return ConfigurableTask(config=definition | {"custom_dataset": _Data(splits)})
    except (AttributeError, IndexError, KeyError, TypeError, UndefinedError) as error:
        name = definition["task"]
        raise ValueError(
            f"{files['test']}: expected items of {name} ({type(error).__name__}: {error}). "
            "Compare their fields with the task's definition in nsa/eval/local_tasks.yaml."
        ) from error


class _Data:
    """What lm-eval calls to get the splits of a task."""

    def __init__(self, splits: _Splits) -> None:
        self.splits = splits

    def __call__(self, **_metadata: Any) -> Any:
        from datasets import Dataset

        return {split: Dataset.from_list(items) for split, items in self.splits.items()}


def _find(task: str, stem: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--task-data: no such folder: {folder} (looked from {Path.cwd()})."
        )
    for suffix in _FILE_SUFFIXES:
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"--task-data: the task {task} reads {stem} with one of {', '.join(_FILE_SUFFIXES)} at its "
        f"end, which is not in {folder}. Without --task-data it is loaded from the Hub."
    )


def _items(path: Path) -> list[dict[str, Any]]:
    items = [record for _, record in read_records(path)]
    if not items:
        raise ValueError(f"{path}: expected items, one JSON object per line, got none.")
    return items


def _values(path: Path, items: list[dict[str, Any]], field: str) -> list[str]:
    values = {item.get(field) for item in items}
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{path}: expected a string in the field {field!r} of every item.")
    return sorted(str(value) for value in values)
