"""Looking inside: which blocks each query reads, with what weight, and what it misses.

``trace`` measures, ``render_page`` shows, ``inspect_text`` goes from files to a page.
"""

from nsa.inspect.measure import LayerTrace, measure_layer
from nsa.inspect.page import chart, document, fragment, headline, render_page
from nsa.inspect.run import inspect_text, tokenize
from nsa.inspect.tracing import Trace, trace

__all__ = [
    "LayerTrace",
    "Trace",
    "chart",
    "document",
    "fragment",
    "headline",
    "inspect_text",
    "measure_layer",
    "render_page",
    "tokenize",
    "trace",
]
