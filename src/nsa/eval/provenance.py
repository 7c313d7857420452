"""Where a result comes from: versions, commit, model, machine. Goes into every results file."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import nsa

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "lm-eval", "datasets")


def provenance(model: PreTrainedModel, path: Path) -> dict[str, Any]:
    """What is needed to repeat a result, as plain values.

    Args:
        model: the model, loaded.
        path: the folder it was loaded from.

    Returns:
        ``model``, ``commit`` (of the package's checkout, None if it is not run from one),
        ``versions``, ``machine``, ``command`` and ``time``.
    """
    device = model.device
    return {
        "model": {
            "path": str(path),
            "class": type(model).__name__,
            "num_parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "config": model.config.to_diff_dict(),
        },
        "commit": commit(Path(nsa.__file__).parent),
        "versions": {"nsa": nsa.__version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "device": str(device),
            "name": (
                torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
            ),
            "num_threads": torch.get_num_threads(),
        },
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit(package: Path) -> str | None:
    """Commit of the checkout that ``package`` is run from, ``+dirty`` if files differ from it.

    Args:
        package: folder of the package, ``src/nsa`` in a checkout.

    Returns:
        None where the package is installed, even if that is inside some other repository.
    """
    try:
        root = _git(package, "rev-parse", "--show-toplevel")
        if Path(root) / "src" / package.name != package:
            return None
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
        return _git(package, "rev-parse", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
