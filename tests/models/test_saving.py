"""Every library's way to say that a file could not be written becomes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.disk import full_disk
from tests.models.tokenizer import character_tokenizer

from nsa.models.saving import write_errors


@pytest.mark.parametrize(
    "save",
    [
        pytest.param(
            lambda folder: character_tokenizer().backend_tokenizer.save(str(folder / "a.json")),
            id="tokenizers",
        ),
        pytest.param(lambda folder: torch.save(torch.zeros(999), folder / "a.pt"), id="torch"),
        pytest.param(
            lambda folder: save_file({"a": torch.zeros(999)}, folder / "a.safetensors"),
            id="safetensors",
        ),
        pytest.param(lambda folder: (folder / "a.txt").write_text("a" * 999), id="file"),
    ],
)
def test_full_disk(save: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"too large|unexpected pos"), full_disk(), write_errors():
        save(tmp_path)


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), write_errors():
        raise KeyError("a bug of ours")
