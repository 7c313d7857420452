"""A file is either the old one or the whole new one."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nsa.train import files


def test_write_text_makes_the_folder_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "note.txt"
    files.write_text(path, "one")
    files.write_text(path, "zwei é")
    assert path.read_text(encoding="utf-8") == "zwei é"
    assert [p.name for p in path.parent.iterdir()] == ["note.txt"]


def test_write_text_keeps_the_old_file_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note.txt"
    files.write_text(path, "one")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*note\.txt'"):
        files.write_text(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_sync_folder_reaches_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b"):
        (tmp_path / name).write_text(name)
    synced: list[int] = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    files.sync_folder(tmp_path)
    assert len(synced) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(OSError(errno.EIO, "broken"), r"^\[Errno 5\] broken: 'a\.txt'$", id="write"),
        # What NumPy raises on a full disk.
        pytest.param(OSError("9 requested"), r"^9 requested: 'a\.txt'$", id="no-number"),
        pytest.param(OSError(errno.EIO, "broken", "b"), r"^\[Errno 5\] broken: 'b'$", id="named"),
    ],
)
def test_naming(error: OSError, message: str) -> None:
    with pytest.raises(OSError, match=message), files.naming(Path("a.txt")):
        raise error
