"""Allocates outputs and launches the kernels; the same function names as ``nsa.reference``."""

from nsa.ops.launch.compressed_attention import compressed_attention_fwd
from nsa.ops.launch.nsa_attention import selected_window_fwd
from nsa.ops.launch.select_blocks import select_blocks, union_blocks

__all__ = [
    "compressed_attention_fwd",
    "select_blocks",
    "selected_window_fwd",
    "union_blocks",
]
