"""The demo's report: one HTML file with loss curves, samples and the inspector."""

from __future__ import annotations

import html
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any

import torch
import transformers

from nsa import __version__
from nsa.demo.settings import BOOK_TITLE, DemoSettings
from nsa.inspect import Trace, chart, document, fragment, headline
from nsa.train.validation import PositionLosses

_COLORS = {"nsa": "var(--slc)", "dense": "var(--twin)"}
_LABELS = {"nsa": "NSA", "dense": "dense twin"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TwinReport:
    """What is reported of one model.

    Args:
        name: ``"nsa"`` or ``"dense"``.
        num_parameters: trained numbers.
        tokens_per_second: in training, its evaluations and start included.
        losses: step and training loss, nats per token.
        validation_losses: step and held-out loss.
        validation: the final held-out loss by position.
        sample: its continuation of the prompt.
    """

    name: str
    num_parameters: int
    tokens_per_second: float
    losses: Sequence[tuple[int, float]]
    validation_losses: Sequence[tuple[int, float]]
    validation: PositionLosses
    sample: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything the page shows.

    Args:
        settings: sizes of the demo.
        twins: NSA, then dense.
        unigram_entropy: of the held-out tokens, in nats.
        prompt: what the samples continue.
        trace: of the NSA model on a held-out passage.
        pieces: that passage, one string per token.
        seconds: the demo took; None if it went on where an earlier one stopped.
    """

    settings: DemoSettings
    twins: Sequence[TwinReport]
    unigram_entropy: float
    prompt: str
    trace: Trace
    pieces: Sequence[str]
    seconds: float | None

    @property
    def gain(self) -> float:
        """Nats by which the sparse model's loss is under the unigram entropy."""
        return self.unigram_entropy - self.twins[0].validation.loss

    @property
    def learned(self) -> bool:
        """Whether that is as much as the settings ask for."""
        return self.settings.min_gain is None or self.gain >= self.settings.min_gain


def verdict(report: Report) -> str:
    """One sentence: whether the sparse model learned, if that is asked, and the numbers."""
    side = "over" if report.gain < 0 else "under"
    said = (
        f"its held-out loss of {report.twins[0].validation.loss:.3f} nats per token is "
        f"{abs(report.gain):.3f} {side} the unigram entropy of {report.unigram_entropy:.3f}, which "
        "knowing no more than how often each token occurs would leave"
    )
    least = report.settings.min_gain
    if least is None:
        return f"The sparse model: {said}."
    if report.learned:
        return f"The sparse model learned: {said}."
    return f"The sparse model did not learn: {said}; expected at least {least:.3f} under it."


def report_html(report: Report) -> str:
    """The page."""
    body = "".join(
        (
            _header(report),
            _charts(report),
            _samples(report),
            '<div class="divider"><h2>Where the sparse model looks</h2>',
            headline(report.trace),
            "</div>",
            fragment(report.trace, report.pieces),
            _sizes(report),
        )
    )
    styles = (files("nsa.demo") / "assets" / "report.css").read_text(encoding="utf-8")
    return document("Native Sparse Attention and its dense twin", body, styles=styles)


def _header(report: Report) -> str:
    nsa, dense = report.twins
    gap = nsa.validation.loss - dense.validation.loss
    relation = "behind" if gap > 0 else "ahead of"
    tiles = [
        *(
            _tile(
                f'<span class="key" style="--c:{_COLORS[twin.name]}"></span>'
                f"{_LABELS[twin.name]}, held-out loss",
                f"{twin.validation.loss:.3f}",
                f"{twin.num_parameters:,} parameters, {twin.tokens_per_second:,.0f} tokens/s",
            )
            for twin in report.twins
        ),
        _tile("Gap, NSA minus dense", f"{gap:+.3f}", "nats per token, lower is better"),
        _tile(
            "Below the unigram entropy",
            f"{report.gain:.3f}",
            f"of {report.unigram_entropy:.3f} nats",
        ),
    ]
    return (
        "<header><h1>A sparse model and its dense twin</h1>"
        f'<p class="lede">Two small language models read {html.escape(BOOK_TITLE)}: the same '
        "text in the same order, one setting apart. On chapters that neither has "
        f"seen, the one with Native Sparse Attention is <b>{abs(gap):.3f} nats per token</b> "
        f"{relation} the one with dense attention.</p>"
        f'<p class="facts">{html.escape(verdict(report))}</p>'
        f'<p class="facts">Trained by <code>nsa demo</code> on this machine. The losses are means '
        f"over {nsa.validation.num_tokens:,} held-out tokens.</p>"
        f'<dl class="numbers">{"".join(tiles)}</dl></header>'
    )


def _tile(title: str, value: str, note: str) -> str:
    return f'<div class="tile"><dt>{title}</dt><dd>{value}<small>{note}</small></dd></div>'


def _charts(report: Report) -> str:
    panels = [
        (
            "Training loss",
            "Nats per token, each point the mean since the one before.",
            _curves(report, "losses", "step", "Training loss of both models"),
        ),
        (
            "Held-out loss",
            "The same chapters after more and more steps.",
            _curves(report, "validation_losses", "step", "Held-out loss of both models"),
        ),
        (
            "Loss by position",
            "Later tokens have more to look back at.",
            _position_chart(report),
        ),
    ]
    return (
        '<div class="charts">'
        + "".join(
            f'<section class="panel"><h2>{title}</h2><p class="note">{note}</p>{chart(spec)}'
            "</section>"
            for title, note, spec in panels
        )
        + "</div>"
    )


def _curves(report: Report, field: str, axis: str, label: str) -> dict[str, Any]:
    points = {twin.name: dict(getattr(twin, field)) for twin in report.twins}
    x = sorted({step for values in points.values() for step in values})
    return {
        "label": label,
        "x": x,
        "xLabel": axis,
        "series": [
            _series(name, [values.get(step) for step in x], mark=len(x) < 12)
            for name, values in points.items()
        ],
    }


def _position_chart(report: Report) -> dict[str, Any]:
    """Mean loss of each bin of positions, drawn at the middle of the bin."""
    edges = report.twins[0].validation.bin_edges
    return {
        "label": "Held-out loss by position in the passage",
        "x": [(low + high) / 2 for low, high in pairwise(edges)],
        "xLabel": "position in the passage",
        "series": [
            _series(twin.name, list(twin.validation.bin_losses), mark=True) for twin in report.twins
        ],
    }


def _series(name: str, values: Sequence[float | None], *, mark: bool) -> dict[str, Any]:
    # JSON has no NaN: a bin without tokens is a gap.
    shown = [v if v is None or math.isfinite(v) else None for v in values]
    return {"name": _LABELS[name], "color": _COLORS[name], "values": shown, "mark": mark}


def _samples(report: Report) -> str:
    prompt = html.escape(report.prompt)
    columns = "".join(
        f'<div><h3><span class="key" style="--c:{_COLORS[twin.name]}"></span>'
        f"{_LABELS[twin.name]}</h3>"
        f'<p class="sample"><span>{prompt}</span>{html.escape(twin.sample)}</p></div>'
        for twin in report.twins
    )
    return (
        '<section class="panel"><h2>Samples</h2><p class="note">Both go on with the first '
        "held-out chapter, in grey. A few minutes of training on one book make words and "
        f'rhythm, not yet sense.</p><div class="samples">{columns}</div></section>'
    )


def _sizes(report: Report) -> str:
    settings, geometry = report.settings, report.settings.geometry
    rows = {
        "model": f"{settings.num_layers} layers, width {settings.hidden_size}, "
        f"{settings.num_heads} query heads, {settings.num_kv_heads} kv heads",
        "sparse attention": f"compression {geometry.compress_block_size}/"
        f"{geometry.compress_stride}, {geometry.num_selected_blocks} blocks of "
        f"{geometry.block_size}, window {geometry.window_size}",
        "training": f"{settings.max_steps} steps of {settings.batch_rows} sequences of "
        f"up to {settings.seq_len} tokens, vocabulary {settings.vocab_size}",
        "book": f"{BOOK_TITLE}; held out from chapter 133",
        "software": f"nsa {__version__}, PyTorch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        "threads" + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    }
    cells = "".join(
        f'<tr><th scope="row">{name}</th><td>{html.escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f'<section class="panel"><h2>Sizes</h2><table class="sizes">{cells}</table></section>'
