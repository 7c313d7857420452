from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from tests.disk import full_disk

from nsa.eval.needle_plot import require_matplotlib, save_heat_map
from nsa.eval.needle_scores import NeedleAnswer, NeedleCell


def cell(num_keys: int, length: int, depth: int, correct: tuple[bool, ...]) -> NeedleCell:
    answers = tuple(
        NeedleAnswer(
            key="k", value="1", position=3, continuation="", correct=c, log_likelihood=-1.0
        )
        for c in correct
    )
    return NeedleCell(num_keys=num_keys, length=length, depth=depth, answers=answers)


CELLS = [
    cell(num_keys, length, depth, (depth > 0, length < 2048))
    for num_keys in (1, 4)
    for length in (1024, 2048)
    for depth in (0, 50, 100)
]


def test_png_is_written_whole(tmp_path: Path):
    path = tmp_path / "new" / "needle.png"
    save_heat_map(CELLS, path, title="a model")
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    assert width > height > 200
    assert [p.name for p in path.parent.iterdir()] == ["needle.png"]


def test_a_full_disk_names_the_file(tmp_path: Path):
    with full_disk(), pytest.raises(OSError, match=r"too large: '.*needle\.png'"):
        save_heat_map(CELLS, tmp_path / "needle.png", title="a model")
    assert list(tmp_path.iterdir()) == []


def test_every_cell_shows_its_own_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = []
    figure_class = require_matplotlib()
    monkeypatch.setattr(
        figure_class, "savefig", lambda self, path, **_: (figures.append(self), path.touch())
    )
    save_heat_map(CELLS, tmp_path / "needle.png", title="a model")
    (figure,) = figures
    assert figure.get_suptitle() == "Needle in a haystack: a model"
    assert [a.get_title() for a in figure.axes] == ["1 needle", "1 of 4 needles"]
    for axes in figure.axes:
        assert [t.get_text() for t in axes.get_xticklabels()] == ["1024", "2048"]
        assert [t.get_text() for t in axes.get_yticklabels()] == ["0%", "50%", "100%"]
        assert [t.get_text() for t in axes.texts] == ["50%", "0%", "100%", "50%", "100%", "50%"]
        assert axes.images[0].get_array().tolist() == [[0.5, 0.0], [1.0, 0.5], [1.0, 0.5]]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "native-sparse-attention\[plot\]"'):
        require_matplotlib()
