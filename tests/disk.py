"""A disk that is full, and files of which the end is lost."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def full_disk(max_bytes: int = 100) -> Iterator[None]:
    """Writes beyond the first ``max_bytes`` of any file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def cut_to_half(path: Path) -> None:
    """Leaves the first half of a file, as a copy that was interrupted does."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
