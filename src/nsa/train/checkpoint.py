"""Checkpoints that are whole or absent: written aside, listed, then renamed into place.

Not a serialiser: transformers' Trainer writes the files. Left alone it writes into
``checkpoint-<step>`` directly and resumes from the highest number it finds, half-written or not.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

from nsa.train.files import sync_folder, write_text

STAGING = ".partial"
_MANIFEST = "files.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(OSError):
    """A checkpoint could not be written; earlier ones are intact."""


def publish(staged: Path, run_dir: Path) -> Path:
    """Makes a folder that was written under ``run_dir / STAGING`` visible, in one step.

    Args:
        staged: the complete folder.
        run_dir: where it goes, under its own name; a folder of that name is replaced.

    Returns:
        The new place.
    """
    sizes = {
        str(p.relative_to(staged)): p.stat().st_size
        for p in sorted(staged.rglob("*"))
        if p.is_file()
    }
    write_text(staged / _MANIFEST, json.dumps(sizes, indent=1))
    sync_folder(staged)
    target = run_dir / staged.name
    if target.exists():
        remove(target)
    return staged.rename(target)


def remove(folder: Path) -> None:
    """Deletes a published folder; a deletion cut short leaves nothing that looks like one."""
    doomed = folder.parent / STAGING / f"deleted-{folder.name}"
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of every published checkpoint of a run, oldest first."""
    if not run_dir.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in run_dir.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in named if match)


def damage(folder: Path) -> str | None:
    """What is wrong with a published folder, or None: a file is missing or has another size.

    Catches copies that were cut short, and checkpoints that something else wrote.
    """
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        return f"it has no {_MANIFEST}, so it was not finished by nsa train"
    try:
        sizes = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        return f"{_MANIFEST} is cut short or damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def latest_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Finds the newest whole checkpoint.

    Args:
        run_dir: folder of the run.

    Returns:
        The folder, or None if there is none, and a line for each newer one that was passed over.
    """
    passed_over: list[str] = []
    for _, folder in reversed(list_checkpoints(run_dir)):
        trouble = damage(folder)
        if trouble is None:
            return folder, passed_over
        passed_over.append(f"{folder} is passed over: {trouble}.")
    return None, passed_over


def rotate(run_dir: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` checkpoints."""
    for _, folder in list_checkpoints(run_dir)[:-keep]:
        remove(folder)


def save_error(error: Exception, *, step: int, run_dir: Path) -> CheckpointError:
    """Turns what a failed save raised into a message that says what is safe and what to do."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    # torch and safetensors report a failed write without its cause; the disk tells.
    full = full or shutil.disk_usage(run_dir).free < 1 << 20
    cause = "the disk is full" if full else f"{error}".strip().splitlines()[0]
    kept, _ = latest_checkpoint(run_dir)
    safe = f"{kept} is intact" if kept else "there is no earlier checkpoint"
    return CheckpointError(
        f"could not save the checkpoint of step {step} in {run_dir}: {cause}; {safe}. "
        "Free some space, then resume the run."
    )
