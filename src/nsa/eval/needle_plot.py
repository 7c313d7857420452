"""The heat map of a needle test: depth against length, one panel per number of needles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nsa.eval.needle_scores import NeedleCell
from nsa.train.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> type[Figure]:
    """The class that figures are made of.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'the heat map needs matplotlib: pip install "native-sparse-attention[plot]"'
        ) from error
    return Figure


def save_heat_map(cells: Sequence[NeedleCell], path: Path, *, title: str) -> None:
    """Draws the accuracy of each cell and writes a PNG.

    Args:
        cells: the whole grid, see :func:`nsa.eval.needle_scores.needle_cells`.
        path: file to write; its folder is created.
        title: what the plot says it is of, such as the model's name.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.

    Example:
        >>> save_heat_map(cells, Path("needle.png"), title="my model")
    """
    figure_class = require_matplotlib()
    keys, lengths, depths = (
        sorted({getattr(cell, name) for cell in cells}) for name in ("num_keys", "length", "depth")
    )
    width = len(keys) * (1.6 + 0.8 * len(lengths))
    figure = figure_class(figsize=(max(5.0, width), 1.8 + 0.45 * len(depths)), layout="constrained")
    figure.suptitle(f"Needle in a haystack: {title}")
    for column, num_keys in enumerate(keys):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            if cell.num_keys == num_keys:
                grid[depths.index(cell.depth), lengths.index(cell.length)] = cell.accuracy
        axes = figure.add_subplot(1, len(keys), column + 1)
        # cividis reads the same with and without colour blindness; the numbers are there anyway.
        axes.imshow(grid, vmin=0.0, vmax=1.0, cmap="cividis", aspect="auto")
        for (row, place), accuracy in np.ndenumerate(grid):
            colour = "black" if accuracy > 0.5 else "white"
            axes.text(place, row, f"{accuracy:.0%}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{d}%" for d in depths])
        axes.set_xlabel("length (tokens)")
        axes.set_title("1 needle" if num_keys == 1 else f"1 of {num_keys} needles")
        if column == 0:
            axes.set_ylabel("depth of the needle")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as staged:
        figure.savefig(staged, format="png", dpi=150)
