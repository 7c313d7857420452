"""Writing that an interruption cannot leave half done: a temporary name, then a rename.

Not a storage layer: two helpers that training, evaluation and reports share.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8 so that ``path`` is either the old file or the whole new one.

    Args:
        path: destination; its folder is created.
        text: the whole content.

    Raises:
        OSError: the folder cannot be written or the disk is full; ``path`` is then untouched.

    Example:
        >>> write_text(Path("runs/a/note.txt"), "done")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.partial")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        # A failed write does not say which file it was.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        staged.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Forces every file under ``folder`` to the disk, so that a rename publishes whole files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
