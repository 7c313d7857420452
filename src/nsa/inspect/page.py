"""The inspector's page: one HTML file that needs no network.

Arrays travel as base64 of zlib streams, one per layer and kv head, and are unpacked when they are
looked at. ``fragment`` is the inspector alone, for pages that show more; ``document`` is the frame.
"""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np

from nsa.inspect.measure import LayerTrace
from nsa.inspect.tracing import Trace

_SCRIPTS = ("chart.js", "cell.js", "map.js", "inspector.js")
_STYLES = ("base.css", "inspector.css")
_PLACE = re.compile(r"\{([a-z_]+)\}")
_CURVES = ("recall", "window_recall", "best_recall", "overlap", "twin_recall")


def document(title: str, body: str, *, styles: str = "") -> str:
    """A whole page: ``body`` (HTML) with the styles and scripts of charts and inspector in it.

    Args:
        title: plain text.
        body: HTML; fragments of inspectors, and figures ``<figure data-chart>`` whose JSON script
            is a chart.
        styles: CSS of the page's own.

    Returns:
        HTML that loads nothing; its content security policy forbids it to.
    """
    parts = {
        "title": html.escape(title),
        "styles": "".join(_asset(name) for name in _STYLES) + styles,
        "body": body,
        "scripts": "".join(_asset(name) for name in _SCRIPTS),
    }
    return _fill(_asset("document.html"), parts)


def render_page(trace: Trace, pieces: Sequence[str], *, model_name: str) -> str:
    """The page that ``nsa inspect`` writes.

    Args:
        trace: of ``nsa.inspect.trace``.
        pieces: the text, one string per token.
        model_name: shown in the header.

    Returns:
        HTML.

    Raises:
        ValueError: the number of pieces is not the number of tokens.
    """
    num_layers = len(trace.layers)
    num_kv_heads = next(iter(trace.layers.values())).overlap.shape[1]
    body = (
        f"<header><h1>Where the model looks</h1>{headline(trace)}"
        f'<p class="facts">{html.escape(model_name)} · {trace.num_tokens:,} tokens · '
        f"{num_layers} {_plural(num_layers, 'layer')} &times; {num_kv_heads} "
        f"{_plural(num_kv_heads, 'kv head')}</p></header>" + fragment(trace, pieces)
    )
    return document(f"Where the model looks: {model_name}", body)


def headline(trace: Trace) -> str:
    """One paragraph of HTML: what is read, what that keeps, how steady it is."""
    layers = trace.layers.values()
    share, kept, best, window, overlap = (
        f"<b>{np.mean(x):.0%}</b>"
        for x in (
            trace.mean(read_share(trace)),
            [trace.mean(layer.recall).mean() for layer in layers],
            [trace.mean(layer.best_recall).mean() for layer in layers],
            [trace.mean(layer.window_recall).mean() for layer in layers],
            [trace.mean(layer.overlap).mean() for layer in layers],
        )
    )
    if not trace.choosing.any():
        return (
            '<p class="lede">This text is so short that every token reads all blocks before it in '
            "full. A longer text shows what the model chooses.</p>"
        )
    return (
        f'<p class="lede">Each token reads {share} of the text before it in full and the rest '
        f"compressed. That keeps {kept} of the attention a dense layer would spend: the window "
        f"alone would keep {window}, the best choice of as many blocks {best}. Neighbouring tokens "
        f"share {overlap} of their blocks.</p>"
    )


def read_share(trace: Trace) -> np.ndarray:
    """Share of the tokens up to each query that it reads in full: float64 ``[T]``, head mean."""
    geometry = trace.geometry
    positions = np.arange(trace.num_tokens)[:, None]
    window_start = np.maximum(0, positions - geometry.window_size + 1)
    total = []
    for layer in trace.layers.values():
        first = layer.block_indices.astype(np.int64) * geometry.block_size
        stop = np.minimum(first + geometry.block_size, window_start[..., None])
        outside = np.where(first >= 0, np.maximum(0, stop - first), 0).sum(-1)
        total.append((outside + positions + 1 - window_start).mean(-1))
    return np.mean(total, axis=0) / (positions[:, 0] + 1)


def fragment(trace: Trace, pieces: Sequence[str]) -> str:
    """The inspector without the page around it; arguments and errors as in ``render_page``."""
    if len(pieces) != trace.num_tokens:
        raise ValueError(
            f"pieces: expected one string per token, {trace.num_tokens}, got {len(pieces)}."
        )
    summaries = {
        f"{number}-{head}": _summary(trace, layer, head)
        for number, layer in trace.layers.items()
        for head in range(layer.overlap.shape[1])
    }
    with_twin = all(layer.twin_recall is not None for layer in trace.layers.values())
    geometry = asdict(trace.geometry)
    meta: dict[str, Any] = {
        "tokens": list(pieces),
        "geometry": geometry,
        "weights": trace.geometry.importance_weights(),
        "numBlocks": trace.geometry.num_blocks(trace.num_tokens),
        "numCompressed": trace.geometry.num_compressed(trace.num_tokens),
        "curves": list(_CURVES if with_twin else _CURVES[:-1]),
        "cells": summaries,
        "start": {
            "cell": max(summaries, key=lambda key: summaries[key]["added"]),
            "query": int(0.8 * (trace.num_tokens - 1)),
        },
    }
    cells = "\n".join(
        f'  <script type="text/plain" data-cell="{number}-{head}">'
        f"{_cell(trace, layer, head, meta)}</script>"
        for number, layer in trace.layers.items()
        for head in range(layer.overlap.shape[1])
    )
    every = (
        "all tokens"
        if not trace.choosing.any()
        else "tokens that have more blocks than they may read"
    )
    parts = {name: str(value) for name, value in geometry.items()} | {
        "averaged": every,
        "picker": _picker(trace),
        "last": str(trace.num_tokens - 1),
        "twin_note": " The dense twin's is the attention of a dense model in the same layer."
        if with_twin
        else "",
        "meta": _json(meta),
        "cells": cells,
    }
    return _fill(_asset("inspector.html"), parts)


def chart(spec: Mapping[str, Any]) -> str:
    """A figure that the page's script draws; ``spec`` as ``lineChart`` in chart.js takes it."""
    return f'<figure data-chart><script type="application/json">{_json(spec)}</script></figure>'


def _summary(trace: Trace, layer: LayerTrace, head: int) -> dict[str, float]:
    gates = trace.mean(_head_gates(layer, head))
    names = [name for name in _CURVES if getattr(layer, name) is not None]
    values = {name: float(trace.mean(getattr(layer, name))[head]) for name in names}
    values |= {f"gate_{name}": float(gates[i]) for i, name in enumerate(("cmp", "slc", "win"))}
    values["added"] = values["recall"] - values["window_recall"]
    return {name: round(value, 4) for name, value in values.items()}


def _head_gates(layer: LayerTrace, head: int) -> np.ndarray:
    """Gates of one kv head, ``[T, 3]``: the mean over its query heads."""
    num_tokens, num_kv_heads = layer.overlap.shape
    return layer.gates.reshape(num_tokens, num_kv_heads, -1, 3)[:, head].mean(1)


def _cell(trace: Trace, layer: LayerTrace, head: int, meta: Mapping[str, Any]) -> str:
    """Base64 of the arrays of one layer and kv head, in the order that cell.js takes them apart."""
    indices = layer.block_indices[:, head]
    member = np.zeros((trace.num_tokens, meta["numBlocks"] + 1), dtype=bool)
    # Unused slots (-1) mark the last column, which is then dropped.
    np.put_along_axis(member, indices.astype(np.int64), True, axis=1)
    arrays = [np.packbits(member[:, :-1], axis=1, bitorder="little")]
    arrays.append(_bytes(_head_gates(layer, head)))
    arrays += [_bytes(getattr(layer, name)[:, head]) for name in meta["curves"]]
    arrays.append(_bytes(np.sqrt(layer.compressed[:, head].astype(np.float32))))
    return base64.b64encode(zlib.compress(b"".join(a.tobytes() for a in arrays), 9)).decode()


def _bytes(values: np.ndarray) -> np.ndarray:
    """Fractions in steps of 1/255; NaN becomes 0."""
    return np.rint(np.nan_to_num(values).clip(0, 1) * 255).astype(np.uint8)


def _picker(trace: Trace) -> str:
    num_kv_heads = next(iter(trace.layers.values())).overlap.shape[1]
    heads = "".join(f'<th scope="col">kv head {head}</th>' for head in range(num_kv_heads))
    rows = [
        f'<tr><th scope="row">layer {number}</th>'
        + "".join(
            f'<td><label><input type="radio" name="cell" value="{number}-{head}" '
            f'aria-label="Layer {number}, kv head {head}"><span></span></label></td>'
            for head in range(num_kv_heads)
        )
        + "</tr>"
        for number in trace.layers
    ]
    return f'<table role="presentation"><tr><td></td>{heads}</tr>{"".join(rows)}</table>'


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _json(value: Any) -> str:
    """JSON that cannot close the script element it stands in."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (files("nsa.inspect") / "assets" / name).read_text(encoding="utf-8")


def _fill(template: str, parts: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda place: parts[place[1]], template)
