"""The demo: two small models, a book, and a report; ``run_demo`` is what ``nsa demo`` calls."""

from nsa.demo.run import DemoStopped, run_demo
from nsa.demo.settings import DemoSettings

__all__ = ["DemoSettings", "DemoStopped", "run_demo"]
