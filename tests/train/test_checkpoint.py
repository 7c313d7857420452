"""A folder with a checkpoint's name is a whole checkpoint."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nsa.train import checkpoint


def _publish(run_dir: Path, name: str, content: str = "weights") -> Path:
    staged = run_dir / checkpoint.STAGING / name
    (staged / "sub").mkdir(parents=True)
    (staged / "a.bin").write_text(content)
    (staged / "sub" / "b.bin").write_text("more")
    return checkpoint.publish(staged, run_dir)


def test_published_checkpoint_is_whole_and_found(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        _publish(tmp_path, f"checkpoint-{step}")
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [9, 10, 100]
    assert checkpoint.latest_checkpoint(tmp_path) == (tmp_path / "checkpoint-100", [])
    assert checkpoint.damage(tmp_path / "checkpoint-100") is None


def test_publishing_again_replaces(tmp_path: Path) -> None:
    _publish(tmp_path, "model", "old")
    target = _publish(tmp_path, "model", "new")
    assert (target / "a.bin").read_text() == "new"
    assert checkpoint.damage(target) is None


@pytest.mark.parametrize(
    ("harm", "trouble"),
    [
        pytest.param(
            lambda f: (f / "a.bin").write_text("w"), r"a\.bin has 1 bytes instead of 7", id="cut"
        ),
        pytest.param(lambda f: (f / "a.bin").unlink(), r"a\.bin is missing", id="missing"),
        pytest.param(
            lambda f: (f / "files.json").unlink(), r"it has no files\.json", id="not-finished"
        ),
        pytest.param(
            lambda f: (f / "files.json").write_text('{"a.bin": 7,'),
            r"files\.json is cut short or damaged",
            id="list-cut",
        ),
    ],
)
def test_damaged_checkpoint_is_passed_over(
    harm: Callable[[Path], object], trouble: str, tmp_path: Path
) -> None:
    _publish(tmp_path, "checkpoint-1")
    harm(_publish(tmp_path, "checkpoint-2"))
    found, passed_over = checkpoint.latest_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-1"
    (line,) = passed_over
    assert re.search(rf"checkpoint-2 is passed over: {trouble}", line)


def test_staged_and_foreign_folders_are_not_checkpoints(tmp_path: Path) -> None:
    (tmp_path / checkpoint.STAGING / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-3").touch()
    assert checkpoint.latest_checkpoint(tmp_path) == (None, [])
    assert checkpoint.list_checkpoints(tmp_path / "absent") == []


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        _publish(tmp_path, f"checkpoint-{step}")
    checkpoint.rotate(tmp_path, keep=2)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [4, 10]
    checkpoint.rotate(tmp_path, keep=5)
    assert len(checkpoint.list_checkpoints(tmp_path)) == 2


def test_deletion_cut_short_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _publish(tmp_path, "checkpoint-2")
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)
    checkpoint.remove(folder)
    assert checkpoint.list_checkpoints(tmp_path) == []
    assert (tmp_path / checkpoint.STAGING / "deleted-checkpoint-2" / "a.bin").is_file()


def test_save_error_says_what_is_safe(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    alone = checkpoint.save_error(full, step=4, run_dir=tmp_path)
    assert "the checkpoint of step 4" in str(alone)
    assert "the disk is full; there is no earlier checkpoint" in str(alone)
    _publish(tmp_path, "checkpoint-2")
    other = checkpoint.save_error(RuntimeError("write failed\nat 0x1"), step=4, run_dir=tmp_path)
    assert f"write failed; {tmp_path / 'checkpoint-2'} is intact" in str(other)
    assert "then resume the run" in str(other)


def test_save_error_without_a_cause_asks_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 0

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage)
    error = checkpoint.save_error(RuntimeError("file write failed"), step=1, run_dir=tmp_path)
    assert "the disk is full" in str(error)
