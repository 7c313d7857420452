"""Evaluation: perplexity by position, needle in a haystack, task suites."""
