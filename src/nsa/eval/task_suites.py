"""Multiple-choice and generation tasks through lm-eval: from local files, or from the Hub.

Which is which: with a data folder, the tasks of ``local_tasks.yaml`` are read from it, and all
others are lm-eval's own, with data from the Hugging Face Hub; without one, all are.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nsa.eval.local_tasks import local_definitions, local_task
from nsa.eval.settings import TaskSettings

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# Resamples for the standard error of a perplexity; those of accuracies have a formula.
_BOOTSTRAP_ITERS = 1000

_LOCAL_HINT = (
    "Without a network use local files: --task-data FOLDER, for any of {}. The error was: {}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """One metric of one task.

    Args:
        task: name; the tasks of a group follow it.
        group: the group that the task was run as part of, or None.
        metric: such as ``"acc"``, with lm-eval's filter behind a comma unless it is ``none``.
        value: the score.
        stderr: its standard error, None where lm-eval gives none.
        num_items: questions answered.
        num_fewshot: solved examples before each; None for a group.
        source: the local file, or ``"hub"``.
    """

    task: str
    group: str | None
    metric: str
    value: float
    stderr: float | None
    num_items: int
    num_fewshot: int | None
    source: str


class LoadedTasks(NamedTuple):
    """Tasks or groups, each with its local file or ``"hub"``, and the manager that made them."""

    tasks: list[tuple[Any, str]]
    manager: TaskManager


def load_tasks(names: Sequence[str], settings: TaskSettings, *, data: Path | None) -> LoadedTasks:
    """Finds tasks and their data.

    Args:
        names: tasks or groups, such as ``["lambada_openai", "mmlu"]``.
        settings: solved examples before each question.
        data: folder with the files of local tasks, or None.

    Returns:
        Tasks in the order of ``names``.

    Raises:
        ValueError: an unknown task, or bad local data.
        FileNotFoundError: a local file is not there.
        ConnectionError: a task needs the Hub and the Hub does not answer.
        ImportError: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            'task suites need lm-eval: pip install "native-sparse-attention[eval]"'
        ) from error
    local = {} if data is None else local_definitions()
    # Listing lm-eval's thousands of tasks takes seconds to half a minute.
    manager = TaskManager(include_defaults=any(name not in local for name in names))
    loaded: list[tuple[Any, str]] = []
    with _one_quiet_process():
        for name in names:
            if data is not None and name in local:
                made = local_task(name, data, num_fewshot=settings.num_fewshot)
                loaded.append((made.task, str(made.files["test"])))
            else:
                found = hub_tasks(name, manager, num_fewshot=settings.num_fewshot)
                loaded += [(task, "hub") for task in found]
    return LoadedTasks(loaded, manager)


def task_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTasks,
    settings: TaskSettings,
    *,
    limit: int | None,
    seed: int,
) -> list[TaskScore]:
    """Runs tasks and collects their scores.

    Args:
        model: causal language model, on its device, in evaluation mode.
        tokenizer: the model's.
        loaded: what to run.
        settings: the same as for :func:`load_tasks`.
        limit: questions per task (of each task in a group) at most.
        seed: of the choice of solved examples.

    Returns:
        Scores, a group's before those of its tasks.

    Raises:
        ValueError: an answer needs more positions than the model has.

    Example:
        >>> loaded = load_tasks(["arc_easy"], TaskSettings(), data=Path("eval-data"))
        >>> task_scores(model, tokenizer, loaded, TaskSettings(), limit=100, seed=0)
    """
    # lm-eval imports these lazily, so their types are lost.
    harness_class: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    run: Any = importlib.import_module("lm_eval.evaluator").evaluate
    task_dict = loaded.manager.load([task for task, _ in loaded.tasks])
    for task in task_dict["tasks"].values():
        wanted = settings.num_fewshot
        if wanted is None:
            wanted = task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=wanted)
        task.set_fewshot_seed(seed=seed)
    with _one_quiet_process():
        results = run(
            lm=_checking(harness_class)(
                pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size
            ),
            task_dict=task_dict,
            limit=limit,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP_ITERS,
        )
    assert results is not None, "lm-eval gives results to the first process only"
    return [
        score
        for task, source in loaded.tasks
        for score in _scores(results, _name(task), group=None, source=source)
    ]


def _checking(harness: Any) -> Any:
    """lm-eval's model; answers that do not fit the model's positions are an input error."""

    class Checking(harness):
        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            longest = max((len(answer) for _, _, answer in requests), default=0)
            if longest > self.max_length:
                raise ValueError(
                    f"--tasks: expected answers of at most {self.max_length} tokens, the positions "
                    f"of the model, got one of {longest}. Leave the task out."
                )
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def generate_until(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().generate_until(*args, **kwargs)
            except AssertionError as error:  # that an answer's room is all the model has
                raise ValueError(f"--tasks: {error} Leave the task out.") from error

    return Checking


def hub_tasks(name: str, manager: TaskManager, *, num_fewshot: int | None) -> list[Any]:
    """One of lm-eval's own tasks, groups or tags, with its data from the Hub or the Hub's cache.

    Args:
        name: as lm-eval calls it.
        manager: lists the tasks.
        num_fewshot: what will be asked for; tasks that are defined without examples refuse it.

    Returns:
        Tasks, or one group.

    Raises:
        ValueError: no such task, or one that takes no solved examples.
        ConnectionError: the Hub does not answer.
        ImportError: the task needs a package that is not installed.
    """
    known = ", ".join(local_definitions())
    if name not in manager.task_index:
        raise ValueError(
            f"--tasks: unknown task {name!r}. Known are lm-eval's tasks (lm-eval ls tasks) and, "
            f"with --task-data, {known}."
        )
    try:
        loaded = manager.load([name])
    except ConnectionError as error:
        hint = _LOCAL_HINT.format(known, error)
        raise ConnectionError(
            f"--tasks: the data of {name} is on the Hugging Face Hub, which does not answer. {hint}"
        ) from error
    except ImportError as error:
        raise ImportError(f"--tasks: {name} needs a package: pip install it. {error}") from error
    for task_name, task in loaded["tasks"].items():
        if num_fewshot and task.get_config("num_fewshot") == 0:
            raise ValueError(
                f"tasks.num_fewshot: expected 0 or nothing for {task_name}, which lm-eval defines "
                f"without solved examples, got {num_fewshot}. Run it on its own."
            )
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _scores(
    results: dict[str, Any], name: str, *, group: str | None, source: str
) -> list[TaskScore]:
    """The scores of a task, or of a group and then of its tasks."""
    row = results["results"].get(name, {})
    scores = []
    for key, value in row.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = row.get(f"{metric}_stderr,{chosen}")
        scores.append(
            TaskScore(
                task=name,
                group=group,
                metric=metric if chosen == "none" else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, float) else None,
                num_items=int(row["sample_len"]),
                num_fewshot=results["n-shot"].get(name),
                source=source,
            )
        )
    for member in results.get("group_subtasks", {}).get(name, []):
        scores += _scores(results, member, group=name, source=source)
    return scores


def _name(task: Any) -> str:
    return task.task_name if hasattr(task, "task_name") else task.name


@contextlib.contextmanager
def _one_quiet_process() -> Iterator[None]:
    """Keeps lm-eval's own notes off the screen, and it from forking a process with threads.

    Its warnings about input that is cut to fit the model stay.
    """
    loggers = [logging.getLogger(f"lm_eval.{name}") for name in ("api.task", "evaluator")]
    levels = [logger.level for logger in loggers]
    harness = logging.getLogger("lm_eval.models.huggingface")
    before = os.environ.get("DISABLE_MULTIPROC")
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        harness.addFilter(_is_about_input)
        os.environ["DISABLE_MULTIPROC"] = "1"
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        harness.removeFilter(_is_about_input)
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


def _is_about_input(record: logging.LogRecord) -> bool:
    return "`pretrained`" not in record.getMessage()
