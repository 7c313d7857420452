from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tests.eval.samples import llama

import nsa
from nsa.eval.provenance import commit, provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.example")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "src" / "nsa"
    package.mkdir(parents=True)
    (package / "a.py").write_text("a = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "a")
    return package


def test_commit_of_a_clean_and_of_a_changed_checkout(checkout: Path):
    head = git(checkout, "rev-parse", "HEAD")
    assert commit(checkout) == head
    (checkout / "a.py").write_text("a = 2\n")
    assert commit(checkout) == f"{head}+dirty"


def test_no_commit_where_the_package_only_lies_in_some_repository(checkout: Path):
    installed = checkout.parents[1] / ".venv" / "nsa"
    installed.mkdir(parents=True)
    assert commit(installed) is None


def test_no_commit_outside_any_repository(tmp_path: Path):
    assert commit(tmp_path) is None


def test_names_what_is_needed_to_repeat_a_result():
    made = provenance(llama(), Path("some/model"))
    assert made["model"]["path"] == "some/model"
    assert made["model"]["class"] == "LlamaForCausalLM"
    assert made["model"]["num_parameters"] == sum(p.numel() for p in llama().parameters())
    assert made["model"]["dtype"] == "float32"
    assert made["model"]["config"]["hidden_size"] == 16
    assert made["versions"]["nsa"] == nsa.__version__
    assert made["versions"]["torch"] == torch.__version__
    assert made["machine"]["device"] == "cpu"
    json.dumps(made)
