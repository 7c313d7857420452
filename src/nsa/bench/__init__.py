"""Measuring: operations against alternatives, this machine, the README's numbers."""
