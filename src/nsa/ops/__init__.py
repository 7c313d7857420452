"""Operations: public functions over ``torch.library`` custom ops.

Each has checks at the public edge, one op per half (forward, backward), a fake and autograd.

Layout is ``[batch, seq, heads, dim]``; rank 3, ``[tokens, heads, dim]``, means packed sequences and
needs ``cu_seqlens``. Tensors on a GPU run the kernels, all others the PyTorch reference;
``backend`` forces either.
"""

from nsa.ops.compress_kv import CompressorWeights, compress_kv
from nsa.ops.compressed_attention import compressed_attention
from nsa.ops.nsa_attention import nsa_attention
from nsa.ops.nsa_decode import nsa_decode
from nsa.ops.select_blocks import select_blocks
from nsa.ops.selected_attention import selected_attention
from nsa.ops.window_attention import window_attention

__all__ = [
    "CompressorWeights",
    "compress_kv",
    "compressed_attention",
    "nsa_attention",
    "nsa_decode",
    "select_blocks",
    "selected_attention",
    "window_attention",
]
