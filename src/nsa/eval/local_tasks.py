"""Well-known tasks from files in a folder: for machines without a network, and for repeatability.

The tasks are defined in ``local_tasks.yaml``. An item of a multiple-choice file has ``query``,
``choices`` and ``gold`` (index from 0); the other fields are listed with the definitions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

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
        ValueError: a file cannot be read, is empty or has too few solved examples, or an item lacks
            a field.
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
    fields = definition.pop("fields")
    splits = {split: _items(path, fields) for split, path in files.items()}
    split_by = definition.pop("split_by", None)
    definition |= {
        "test_split": "test",
        "fewshot_split": "fewshot" if "fewshot" in files else "test",
        "num_fewshot": shots,
    }
    if split_by is None:
        return LocalTask(_build(definition | {"task": name}, splits), files)
    group = Group(
        name,
        aggregate_metric_list=[AggMetricConfig(m["metric"]) for m in definition["metric_list"]],
    )
    for value in sorted({item[split_by] for item in splits["test"]}):
        chosen = {
            split: [item for item in items if item[split_by] == value]
            for split, items in splits.items()
        }
        member = {
            "task": f"{name}_{value}",
            "description": definition["description"].format(value=value.replace("_", " ")),
        }
        group.add(_build(definition | member, chosen))
    return LocalTask(group, files)


def _build(definition: dict[str, Any], splits: _Splits) -> Task:
    from lm_eval.api.task import ConfigurableTask

    # A question is no example of itself.
    solved = len(splits["fewshot"]) if "fewshot" in splits else len(splits["test"]) - 1
    if definition["num_fewshot"] > solved:
        raise ValueError(
            f"tasks.num_fewshot: expected at most {solved} for {definition['task']}, the solved "
            f"examples in its file, got {definition['num_fewshot']}."
        )
    return ConfigurableTask(config=definition | {"custom_dataset": _Data(splits)})


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


def _items(path: Path, fields: Mapping[str, str]) -> list[dict[str, Any]]:
    """The objects of a file, each with all ``fields``; other fields are dropped."""
    items = []
    for where, record in read_records(path):
        for field, kind in fields.items():
            if not _is(kind, record.get(field), record):
                raise ValueError(
                    f"{where}: expected {kind} in the field {field!r}, "
                    f"got {record.get(field, 'nothing')!r}."
                )
        items.append({field: record[field] for field in fields})
    if not items:
        raise ValueError(f"{path}: expected items, one JSON object per line, got none.")
    return items


def _is(kind: str, value: Any, record: Mapping[str, Any]) -> bool:
    if kind == "truth":
        return isinstance(value, bool)
    if kind == "index":
        return type(value) is int and 0 <= value < len(record["choices"])
    if kind.endswith("choices"):
        if not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
            return False
        number = kind.removesuffix("choices").strip()
        return len(value) == int(number) if number else len(value) > 1
    assert kind in ("text", "text with _"), f"unknown kind of field: {kind}"
    return isinstance(value, str) and (kind == "text" or "_" in value)
