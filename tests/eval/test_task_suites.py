from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.eval.samples import llama, tokenizer
from tests.eval.task_files import ITEMS, write_task_files

from nsa.eval.settings import TaskSettings
from nsa.eval.task_suites import (
    LoadedTasks,
    TaskScore,
    hub_tasks,
    load_tasks,
    task_scores,
)


def likelihood(context: str, answer: str) -> tuple[float, bool]:
    """Log-likelihood of an answer, and whether greedy decoding gives it, from the model itself."""
    start = tokenizer().bos_token_id
    prompt = [start, *tokenizer()(context, add_special_tokens=False)["input_ids"]]
    ids = [start, *tokenizer()(context + answer, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logp = llama()(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(len(prompt), len(ids))
    likeliest = all(int(logp[p - 1].argmax()) == ids[p] for p in places)
    return sum(float(logp[p - 1, ids[p]]) for p in places), likeliest


def run(tmp_path: Path, names: list[str], **options: Any) -> list[TaskScore]:
    settings = TaskSettings(**options.pop("settings", {}))
    loaded = load_tasks(names, settings, data=write_task_files(tmp_path))
    return task_scores(
        llama(), tokenizer(), loaded, settings, **{"limit": None, "seed": 0} | options
    )


def test_scores_are_those_of_the_likelihoods(tmp_path: Path):
    scores = run(tmp_path, ["lambada_openai", "arc_easy"], settings={"batch_size": 3})
    items = ITEMS["lambada_openai_test"]
    words = [likelihood(item["context"], f" {item['target']}") for item in items]
    right = []
    for item in ITEMS["arc_easy_test"]:
        prompt = f"Question: {item['query']}\nAnswer:"
        values = [likelihood(prompt, f" {choice}")[0] for choice in item["choices"]]
        right.append(values.index(max(values)) == item["gold"])
    got = {(s.task, s.metric): s.value for s in scores}
    assert got["lambada_openai", "perplexity"] == pytest.approx(
        math.exp(-sum(value for value, _ in words) / len(words)), rel=1e-4
    )
    assert got["lambada_openai", "acc"] == sum(likeliest for _, likeliest in words) / len(words)
    assert got["arc_easy", "acc"] == sum(right) / len(right)
    assert set(got) == {
        *(("lambada_openai", metric) for metric in ("perplexity", "acc")),
        *(("arc_easy", metric) for metric in ("acc", "acc_norm")),
    }
    assert {s.num_items for s in scores} == {2}
    assert scores[0].source == str(tmp_path / "lambada_openai_test.jsonl.xz")


def test_a_group_is_averaged_over_its_questions_and_followed_by_its_tasks(tmp_path: Path):
    scores = run(tmp_path, ["mmlu", "arc_easy"], settings={"num_fewshot": 1})
    assert [(s.task, s.group, s.num_items) for s in scores] == [
        ("mmlu", None, 3),
        ("mmlu_deep_sea", "mmlu", 2),
        ("mmlu_moon", "mmlu", 1),
        ("arc_easy", None, 2),
        ("arc_easy", None, 2),
    ]
    whole, sea, moon, *arc = scores
    assert whole.value == pytest.approx((2 * sea.value + moon.value) / 3)
    assert [s.num_fewshot for s in (sea, moon, *arc)] == [1, 1, 1, 1]


def test_generation_tasks_run_and_the_limit_holds(tmp_path: Path):
    scores = run(tmp_path, ["gsm8k", "arc_easy"], limit=1, settings={"num_fewshot": 1})
    assert [(s.task, s.metric, s.num_items, s.num_fewshot) for s in scores] == [
        ("gsm8k", "exact_match,strict-match", 1, 1),
        ("gsm8k", "exact_match,flexible-extract", 1, 1),
        ("arc_easy", "acc", 1, 1),
        ("arc_easy", "acc_norm", 1, 1),
    ]


@pytest.mark.parametrize(
    ("task", "positions", "message"),
    [
        ("arc_easy", 1, r"--tasks: expected answers of at most 1 tokens, .* got one of [2-9]\."),
        ("gsm8k", 128, r"--tasks: .*256.* must be less than .*128.* Leave the task out"),
    ],
)
def test_an_answer_that_does_not_fit_the_model_is_named(
    tmp_path: Path, task: str, positions: int, message: str
):
    settings = TaskSettings(num_fewshot=0)
    loaded = load_tasks([task], settings, data=write_task_files(tmp_path))
    with pytest.raises(ValueError, match=message):
        task_scores(llama(positions), tokenizer(), loaded, settings, limit=None, seed=0)


def test_nothing_of_the_process_stays_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "")
    level = logging.getLogger("lm_eval.api.task").level
    run(tmp_path, ["boolq"])
    assert os.environ["DISABLE_MULTIPROC"] == ""
    assert logging.getLogger("lm_eval.api.task").level == level
    assert not logging.getLogger("lm_eval.models.huggingface").filters


class Manager:
    """A task manager that knows one task and cannot load it."""

    def __init__(self, outcome: Any) -> None:
        self.task_index = {"drop": object()}
        self.outcome = outcome

    def load(self, names: list[str]) -> Any:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    ("name", "outcome", "num_fewshot", "error", "message"),
    [
        ("drip", None, None, ValueError, "--tasks: unknown task 'drip'. Known are .*gsm8k"),
        (
            "drop",
            ConnectionError("Couldn't reach 'EleutherAI/drop' on the Hub"),
            None,
            ConnectionError,
            "the data of drop is on the Hugging Face Hub, which does not answer. Without a "
            "network use local files: --task-data FOLDER, for any of .*mmlu.*Couldn't reach",
        ),
        ("drop", ImportError("no wonderwords"), None, ImportError, "drop needs a package: pip ins"),
        (
            "drop",
            {"tasks": {"drop": SimpleNamespace(get_config=lambda _: 0)}},
            3,
            ValueError,
            "tasks.num_fewshot: expected 0 or nothing for drop, .* got 3",
        ),
    ],
    ids=["unknown", "no-network", "no-package", "takes-no-examples"],
)
def test_tasks_of_the_hub_that_cannot_run(
    name: str, outcome: Any, num_fewshot: int | None, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        hub_tasks(name, Manager(outcome), num_fewshot=num_fewshot)  # type: ignore[arg-type]


def test_tasks_and_groups_of_the_hub():
    first, second = (SimpleNamespace(get_config=lambda _: None) for _ in range(2))
    tag = Manager({"tasks": {"a": first, "b": second}})
    assert hub_tasks("drop", tag, num_fewshot=3) == [first, second]  # type: ignore[arg-type]
    group = Manager({"tasks": {"a": first}, "groups": {"drop": "whole", "part": "part"}})
    assert hub_tasks("drop", group, num_fewshot=None) == ["whole"]  # type: ignore[arg-type]


@pytest.mark.parametrize("with_folder", [True, False], ids=["folder", "no-folder"])
def test_which_tasks_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_folder: bool):
    asked: list[str] = []
    manager = SimpleNamespace()
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: manager)
    monkeypatch.setattr(
        "nsa.eval.task_suites.hub_tasks", lambda name, *_, **__: asked.append(name) or [name]
    )
    data = write_task_files(tmp_path) if with_folder else None
    loaded = load_tasks(["boolq", "drop"], TaskSettings(), data=data)
    assert asked == (["drop"] if with_folder else ["boolq", "drop"])
    assert isinstance(loaded, LoadedTasks)
    assert loaded.tasks[-1] == ("drop", "hub")


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r'pip install "native-sparse-attention\[eval\]"'):
        load_tasks(["boolq"], TaskSettings(), data=None)
