"""Writing that an interruption cannot leave half done: a temporary name, then a rename.

Not a storage layer: a few helpers that training, evaluation and reports share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    with replacing(path) as staged, staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, which the file that the block writes there then replaces.

    A block that fails leaves ``path`` as it was and nothing beside it.

    Raises:
        OSError: the block's, naming ``path`` where it named no file.

    Example:
        >>> with replacing(Path("look.png")) as staged:
        ...     figure.savefig(staged, format="png")
    """
    staged = path.with_name(f".{path.name}.partial")
    try:
        with naming(path):
            yield staged
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Forces every file under ``folder`` to the disk, so that a rename publishes whole files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with naming(path), path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names ``path`` in an ``OSError`` that names no file, as that of a failed read or write.

    Example:
        >>> with naming(path), path.open("wb") as file:
        ...     file.write(content)
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:
            raise OSError(f"{error}: '{path}'") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
