"""One picture of results: time against length, a panel for each operation and mode."""

from __future__ import annotations

from pathlib import Path

from nsa.bench.results import Row, latest

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
    """
    if output.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"output: expected .svg, .png or .pdf, got {output.name!r}.")
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
    temporary = output.with_name(f".{output.stem}.tmp{output.suffix}")
    figure.savefig(temporary)
    temporary.replace(output)


def _draw(ax: Axes, rows: list[Row]) -> None:
    ax.set_title(f"{rows[0]['operation']} {rows[0]['mode']}", fontsize=10)
    for line in dict.fromkeys((row["provider"], row["workload"]) for row in rows):
        points = sorted(
            (row["seq_len"], row["p50_ms"], row["p20_ms"], row["p80_ms"])
            for row in rows
            if (row["provider"], row["workload"]) == line
        )
        tokens, middle, low, high = zip(*points, strict=True)
        ax.plot(tokens, middle, marker="o", markersize=4, label=", ".join(line))
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
