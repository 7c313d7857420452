"""The demo: two small models, a book, and a report; ``run_demo`` is what ``nsa demo`` calls."""

from nsa.demo.run import DemoDidNotLearn, DemoStopped, run_demo
from nsa.demo.settings import DemoSettings

__all__ = ["DemoDidNotLearn", "DemoSettings", "DemoStopped", "run_demo"]
