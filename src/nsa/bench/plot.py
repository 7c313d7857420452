"""Pictures of results: times of each operation, and the layer's speed-up over dense attention."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from nsa.bench.results import Row, group_size, is_grouped, latest, with_speedup
from nsa.train.files import replacing

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
except ImportError as error:
    raise ImportError(
        'Plots need matplotlib. Run: pip install "native-sparse-attention[plot]"'
    ) from error


def plot(rows: list[Row], output: Path) -> None:
    """Writes a plot of the latest measurement of each case; the suffix chooses the format.

    Args:
        rows: results of one device, dtype and shape.
        output: ``.svg``, ``.png`` or ``.pdf``.

    Raises:
        ValueError: there is nothing to plot, or the rows mix devices, dtypes or shapes.
        OSError: the disk is full; nothing is left of the file.
    """
    _check_suffix(output)
    rows = latest(rows)
    setups = sorted({(row["device"], row["dtype"], row["shape"]) for row in rows})
    if len(setups) != 1:
        raise ValueError(
            f"results: expected one device, dtype and shape, got {setups or 'no rows'}. "
            "Choose with --device-name, --dtype or --shape."
        )
    panels = list(dict.fromkeys((row["operation"], row["mode"]) for row in rows))
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flatten()
    for panel, ax in zip(panels, axes, strict=False):
        _draw(ax, [row for row in rows if (row["operation"], row["mode"]) == panel])
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.suptitle(", ".join(str(part) for part in setups[0]))
    _write(figure, output)


def plot_speedup(rows: list[Row], output: Path) -> None:
    """Writes how many times as long dense attention takes as the whole layer.

    One panel against the length, of the shapes measured at several if there are any; one against
    the number of query heads that share keys, if the "group" shapes were measured.

    Args:
        rows: results of one device and dtype, with dense attention of the same lengths.
        output: ``.svg``, ``.png`` or ``.pdf``.

    Raises:
        ValueError: there is nothing to plot, or the rows mix devices or dtypes.
        OSError: the disk is full; nothing is left of the file.
    """
    _check_suffix(output)
    rows = [row for row in latest(with_speedup(rows)) if row["operation"] == "pipeline"]
    rows = [row for row in rows if row["speedup"] is not None]
    setups = sorted({(row["device"], row["dtype"]) for row in rows})
    if len(setups) != 1:
        raise ValueError(
            f"results: expected the pipeline beside dense attention of one device and dtype, got "
            f"{setups or 'no rows'}. Choose with --device-name or --dtype."
        )
    grouped = [row for row in rows if is_grouped(row)]
    others = _at_several_lengths([row for row in rows if not is_grouped(row)])
    panels = [
        (part, heading, key)
        for part, heading, key in (
            (others, "tokens", lambda row: row["seq_len"]),
            (
                grouped,
                "query heads that share keys",
                group_size,
            ),
        )
        if part
    ]
    figure = Figure(figsize=(5.6 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for (part, heading, key), ax in zip(panels, axes, strict=True):
        _draw_speedup(ax, part, heading, key)
    figure.suptitle(f"Speed-up over dense attention, {', '.join(setups[0])}")
    _write(figure, output)


def _at_several_lengths(rows: list[Row]) -> list[Row]:
    """Those that make a line: points of other shapes would hide it. All if there is no line."""
    lengths: dict[str, set[int]] = {}
    for row in rows:
        lengths.setdefault(row["shape"], set()).add(row["seq_len"])
    return [row for row in rows if len(lengths[row["shape"]]) > 1] or rows


def _draw_speedup(ax: Axes, rows: list[Row], heading: str, key: Callable[[Row], int]) -> None:
    """A colour for each kind of input; forward drawn through, backward dashed."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    layers = {_layer(row) for row in rows}
    for row in rows:
        layer = f"{_layer(row)}, " if len(layers) > 1 else ""
        name = f"{layer}{row['compressor']}, {row['workload']} ({row['provider']})"
        lines.setdefault((name, row["mode"]), []).append((key(row), row["speedup"]))
    names = list(dict.fromkeys(name for name, _ in lines))
    for (name, mode), points in lines.items():
        values, ratios = zip(*sorted(points), strict=True)
        color = f"C{names.index(name) % 10}"
        style = "-" if mode == "forward" else "--"
        label = f"{name} {mode}"
        ax.plot(values, ratios, style, color=color, marker="o", markersize=4, label=label)
    ax.axhline(1, color="grey", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ticks = sorted({key(row) for row in rows})
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel(heading)
    ax.set_ylabel("times as fast")
    ax.grid(alpha=0.3)
    # Below the panel, where it hides no line.
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _layer(row: Row) -> str:
    """What tells lines of a panel apart: the shape, or the widths where shapes differ in groups."""
    return f"widths {row['key_dim']} and {row['value_dim']}" if is_grouped(row) else row["shape"]


def _check_suffix(output: Path) -> None:
    if output.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"output: expected .svg, .png or .pdf, got {output.name!r}.")


def _write(figure: Figure, output: Path) -> None:
    # In memory first: matplotlib's PDF writer hides the error of a full disk behind its own.
    picture = io.BytesIO()
    # Without a date, so that the same rows give the same file.
    metadata = {"Date": None} if output.suffix == ".svg" else None
    figure.savefig(picture, format=output.suffix.removeprefix("."), metadata=metadata)
    with replacing(output) as staged:
        staged.write_bytes(picture.getvalue())


def _line(row: Row) -> str:
    parts = (row["provider"], row["workload"], row["compressor"])
    return ", ".join(part for part in parts if part is not None)


def _draw(ax: Axes, rows: list[Row]) -> None:
    ax.set_title(f"{rows[0]['operation']} {rows[0]['mode']}", fontsize=10)
    for line in dict.fromkeys(map(_line, rows)):
        points = sorted(
            (row["seq_len"], row["p50_ms"], row["p20_ms"], row["p80_ms"])
            for row in rows
            if _line(row) == line
        )
        tokens, middle, low, high = zip(*points, strict=True)
        ax.plot(tokens, middle, marker="o", markersize=4, label=line)
        ax.fill_between(tokens, low, high, alpha=0.2)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    lengths = sorted({row["seq_len"] for row in rows})
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("tokens")
    ax.set_ylabel("ms")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
