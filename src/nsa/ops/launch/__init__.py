"""Allocates outputs and launches the kernels; the same functions as ``nsa.reference``."""

from nsa.ops.launch.compress_kv import compress_bwd, compress_fwd
from nsa.ops.launch.compressed_attention import compressed_attention_bwd, compressed_attention_fwd
from nsa.ops.launch.nsa_attention import branch_outputs, nsa_attention_bwd, nsa_attention_fwd
from nsa.ops.launch.select_blocks import select_blocks
from nsa.ops.launch.selected_attention import selected_attention_bwd, selected_attention_fwd
from nsa.ops.launch.window_attention import window_attention_bwd, window_attention_fwd

__all__ = [
    "branch_outputs",
    "compress_bwd",
    "compress_fwd",
    "compressed_attention_bwd",
    "compressed_attention_fwd",
    "nsa_attention_bwd",
    "nsa_attention_fwd",
    "select_blocks",
    "selected_attention_bwd",
    "selected_attention_fwd",
    "window_attention_bwd",
    "window_attention_fwd",
]
