from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.eval.task_files import write_task_files

from nsa.eval.local_tasks import local_definitions, local_task

QUESTION = "Question: What sails\nAnswer:"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_task_files(tmp_path)


def requests(task, num_fewshot: int = 0) -> list[tuple[str, ...]]:
    """What lm-eval would ask a model about the first question."""
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=0)
    task.build_all_requests(limit=1)
    return [instance.args for instance in task.instances]


def test_prompts_and_answers(folder: Path):
    def asked(name: str) -> list[tuple[str, ...]]:
        return requests(local_task(name, folder, num_fewshot=0).task)

    choices = [" a ship", " the moon", " men", " old"]
    assert asked("lambada_openai") == [("The old ship sails under the", " moon")]
    assert asked("arc_easy") == [(QUESTION, choice) for choice in choices]
    assert asked("arc_challenge") == [(QUESTION, choice) for choice in choices]
    assert asked("hellaswag") == [("What sails", choice) for choice in choices]
    assert asked("piqa") == [(QUESTION, " sing"), (QUESTION, " sail")]
    assert asked("winogrande") == [
        ("The whale met the ship and whale", " sang."),
        ("The whale met the ship and ship", " sang."),
    ]
    assert asked("commonsense_qa")[1] == (
        "Question: What sails\nA. a\nB. b\nC. c\nD. d\nE. e\nAnswer:",
        " B",
    )
    boolq = "Old men sing.\nQuestion: do men sing?\nAnswer:"
    assert asked("boolq") == [(boolq, " no"), (boolq, " yes")]
    prompt, options = asked("gsm8k")[0]
    assert prompt == "Question: Two ships and two?\nAnswer:"
    assert options["until"] == ["Question:", "</s>", "<|im_end|>"]
    assert not set(local_definitions()) - {
        *("lambada_openai", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande"),
        *("commonsense_qa", "boolq", "gsm8k", "mmlu"),
    }


@pytest.mark.parametrize(
    ("name", "gold"),
    [("arc_easy", 0), ("piqa", 0), ("winogrande", 1), ("commonsense_qa", 0), ("boolq", 1)],
)
def test_the_right_choice_scores(folder: Path, name: str, gold: int):
    task = local_task(name, folder, num_fewshot=0).task
    doc = task.eval_docs[0]
    num_choices = len(task.doc_to_choice(doc))
    for choice in range(num_choices):
        answers = [(0.0 if i == choice else -9.0, False) for i in range(num_choices)]
        assert task.process_results(doc, answers)["acc"] == float(choice == gold)


@pytest.mark.parametrize(
    ("written", "strict", "flexible"),
    [("2 + 2 = 4\n#### 4", 1.0, 1.0), ("I think 4", 0.0, 1.0), ("#### 5", 0.0, 0.0)],
    ids=["as-asked", "just-the-number", "wrong"],
)
def test_numbers_are_taken_from_what_was_written(
    folder: Path, written: str, strict: float, flexible: float
):
    task = local_task("gsm8k", folder, num_fewshot=0).task
    requests(task)
    task.instances[0].resps.append(written)
    task.apply_filters()
    got = task.instances[0].filtered_resps
    scores = {
        name: task.process_results(task.eval_docs[0], [answer])["exact_match"]
        for name, answer in got.items()
    }
    assert scores == {"strict-match": strict, "flexible-extract": flexible}


def test_a_split_task_is_one_task_per_subject(folder: Path):
    group, files = local_task("mmlu", folder, num_fewshot=1)
    sea, moon = group.get_all_tasks()
    assert files == {"test": folder / "mmlu_test.jsonl", "fewshot": folder / "mmlu_dev.jsonl.xz"}
    assert [sea.task_name, moon.task_name] == ["mmlu_deep_sea", "mmlu_moon"]
    assert [len(sea.eval_docs), len(moon.eval_docs)] == [2, 1]
    prompt, answer = requests(sea, num_fewshot=1)[0]
    options = "A. a ship\nB. the moon\nC. men\nD. old\nAnswer:"
    assert prompt == (
        "The following are multiple choice questions (with answers) about deep sea.\n\n"
        f"Solved deep_sea\n{options} A\n\nWhat sails\n{options}"
    )
    assert answer == " A"


def test_solved_examples_come_from_their_file(folder: Path):
    prompt, _ = requests(local_task("arc_easy", folder, num_fewshot=1).task, num_fewshot=1)[0]
    assert prompt == f"Question: Solved\nAnswer: the moon\n\n{QUESTION}"


def test_own_number_of_examples_is_the_default(folder: Path):
    assert local_task("gsm8k", folder, num_fewshot=None).task.get_config("num_fewshot") == 5
    assert local_task("arc_easy", folder, num_fewshot=None).task.get_config("num_fewshot") == 0


def test_the_file_of_examples_is_not_needed_without_them(folder: Path):
    (folder / "gsm8k_train.jsonl.xz").unlink()
    assert set(local_task("gsm8k", folder, num_fewshot=0).files) == {"test"}
    with pytest.raises(FileNotFoundError, match=r"the task gsm8k reads gsm8k_train with one of"):
        local_task("gsm8k", folder, num_fewshot=None)


def test_missing_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"--task-data: no such folder: .*nowhere"):
        local_task("boolq", tmp_path / "nowhere", num_fewshot=None)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("boolq", "boolq_validation", "", "expected items, one JSON object per line, got none"),
        ("boolq", "boolq_validation", "{", "jsonl:1: expected one JSON object per line"),
        (
            "boolq",
            "boolq_validation",
            '{"passage": "a", "question": "b", "answer": 1}',
            "jsonl:1: expected truth in the field 'answer', got 1",
        ),
        (
            "arc_easy",
            "arc_easy_test",
            '{"query": "a", "choices": ["b", "c"], "gold": 1}\n{"query": "a", "gold": 0}',
            "jsonl:2: expected choices in the field 'choices', got 'nothing'",
        ),
        (
            "arc_easy",
            "arc_easy_test",
            '{"query": "a", "choices": ["b", "c"], "gold": 2}',
            "expected index in the field 'gold', got 2",
        ),
        (
            "piqa",
            "piqa_valid",
            '{"query": "a", "choices": ["b", "c", "d"], "gold": 0}',
            "expected 2 choices in the field 'choices', got .*'d'",
        ),
        (
            "winogrande",
            "winogrande_xl_validation",
            '{"sentence": "a", "choices": ["b", "c"], "gold": 0}',
            "expected text with _ in the field 'sentence', got 'a'",
        ),
        ("mmlu", "mmlu_test", '{"query": "a"}', "expected text in the field 'subject', got 'noth"),
    ],
    ids=["empty", "json", "truth", "choices", "index", "two-choices", "blank", "subject"],
)
def test_bad_items(tmp_path: Path, name: str, file: str, content: str, message: str):
    (tmp_path / f"{file}.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        local_task(name, tmp_path, num_fewshot=0)


@pytest.mark.parametrize(
    ("name", "num_fewshot", "message"),
    [
        ("mmlu", 2, "num_fewshot: expected at most 1 for mmlu_deep_sea, the solved examples in"),
        ("boolq", 1, "num_fewshot: expected at most 0 for boolq, the solved examples in its file"),
    ],
    ids=["own-file", "other-questions"],
)
def test_more_solved_examples_than_there_are(
    folder: Path, name: str, num_fewshot: int, message: str
):
    with pytest.raises(ValueError, match=message):
        local_task(name, folder, num_fewshot=num_fewshot)


def test_without_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.group", None)
    with pytest.raises(ImportError, match=r'pip install "native-sparse-attention\[eval\]"'):
        local_task("boolq", folder, num_fewshot=None)
