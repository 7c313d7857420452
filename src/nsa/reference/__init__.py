"""The algorithm in plain PyTorch: the path of every tensor that is not on a GPU.

It is also the specification. One file per operation, any device, any float dtype (below float32 the
arithmetic runs in float32). Forward and backward are written out, not left to autograd, and both
walk over chunks of queries, so memory grows linearly with the length. Nothing here imports the
kernels.
"""

from nsa.reference.compress_kv import compress_bwd, compress_fwd
from nsa.reference.compressed_attention import compressed_attention_bwd, compressed_attention_fwd
from nsa.reference.nsa_attention import (
    branch_outputs,
    combine,
    nsa_attention_bwd,
    nsa_attention_fwd,
)
from nsa.reference.nsa_decode import nsa_decode
from nsa.reference.select_blocks import block_scores, select_blocks
from nsa.reference.selected_attention import selected_attention_bwd, selected_attention_fwd
from nsa.reference.window_attention import window_attention_bwd, window_attention_fwd

__all__ = [
    "block_scores",
    "branch_outputs",
    "combine",
    "compress_bwd",
    "compress_fwd",
    "compressed_attention_bwd",
    "compressed_attention_fwd",
    "nsa_attention_bwd",
    "nsa_attention_fwd",
    "nsa_decode",
    "select_blocks",
    "selected_attention_bwd",
    "selected_attention_fwd",
    "window_attention_bwd",
    "window_attention_fwd",
]
