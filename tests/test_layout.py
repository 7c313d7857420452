"""The shape of the repository: tests mirror sources, files stay small, documents are fresh."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nsa
from nsa import cli
from nsa.bench.readme import refresh

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "nsa").rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 200

# Modules without behaviour of their own, and the test file that would fail if they were wrong.
TESTED_ELSEWHERE = {
    "ops/fakes.py": "tests/ops/contract.py",
}
# Kernels and their launches are tested through one file, which compares each with the reference.
TESTED_TOGETHER = {
    "kernels": "tests/kernels/test_kernels.py",
    "ops/launch": "tests/kernels/test_kernels.py",
}


def named(path):
    return path.relative_to(ROOT / "src" / "nsa").as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_module_has_its_test_file(path):
    name = named(path)
    if path.name == "__init__.py":
        return
    folder = Path(name).parent.as_posix()
    mirrored = TESTED_TOGETHER.get(folder, f"tests/{folder}/test_{path.name}")
    expected = TESTED_ELSEWHERE.get(name, mirrored)
    assert (ROOT / expected).is_file(), f"{name}: expected its tests in {expected}"


def test_exceptions_are_still_needed():
    for name in TESTED_ELSEWHERE:
        assert (ROOT / "src" / "nsa" / name).is_file(), name


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{named(path)}: {lines} lines, at most {MAX_FILE_LINES}"
    limit = MAX_KERNEL_LINES if "kernels" in path.parts else MAX_FUNCTION_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = function_lines(node)
            assert size <= limit, f"{named(path)}: {node.name} has {size} lines, at most {limit}"


def function_lines(node):
    """Lines of the body, without the docstring and without the signature's one line a parameter."""
    body = node.body
    if ast.get_docstring(node) is not None:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_function_lines_counts_the_body():
    code = 'def f(\n    a,\n):\n    """One.\n\n    Two.\n    """\n    x = a\n\n    return x\n'
    assert function_lines(ast.parse(code).body[0]) == 3


def test_the_version_is_in_one_place():
    assert importlib.metadata.version("native-sparse-attention") == nsa.__version__
    typed = re.compile(rf"(?<![\w.]){re.escape(nsa.__version__)}(?![\w.])")
    for path in [ROOT / "pyproject.toml", ROOT / "README.md", *SOURCES]:
        if path == ROOT / "src" / "nsa" / "__init__.py":
            continue
        assert not typed.search(path.read_text(encoding="utf-8")), path


def test_generated_parts_of_the_readme_are_fresh():
    assert refresh(README, ROOT) == README, "run: nsa bench table"


def test_the_readme_has_every_command():
    group = cli.app
    names = {command.name or command.callback.__name__ for command in group.registered_commands}
    for name in sorted(names):
        assert f"`nsa {name}" in README, name


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_equation_table_names_what_exists():
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\| (`.*) \|$", text, re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        for file, functions in re.findall(r"`([\w/]+\.py)`(?:: ((?:`[\w.]+`(?:, )?)+))?", row):
            source = (ROOT / "src" / "nsa" / file).read_text(encoding="utf-8")
            for function in re.findall(r"`([\w.]+)`", functions):
                name = function.split(".")[-1]
                assert re.search(rf"\b(def|class) {name}\b", source), f"{file}: {function}"


def test_the_equation_table_names_every_equation():
    """Section 3 of the paper numbers its equations from 1 to 12."""
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+)(?:-(\d+))? \| .* \| (.*) \|$", text, re.MULTILINE)
    numbers = [n for first, last, _ in rows for n in range(int(first), int(last or first) + 1)]
    assert numbers == list(range(1, 13))
    for *_, functions in rows:
        assert re.search(r"`[\w/]+\.py`: `\w+", functions), functions


def test_budgets_of_the_linters_are_ours():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "line-length = 100" in text
    assert "max-args = 10" in text
    assert 'filterwarnings = [\n  "error",' in text
