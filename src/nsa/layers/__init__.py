"""Modules: attention with its projections, gates and compressor; norms; feed-forward."""
