"""Modules: attention with its projections, gates and compressor; its dense twin; rotation."""

from nsa.layers.compressor import Compressor
from nsa.layers.dense_attention import DenseAttention
from nsa.layers.native_sparse_attention import BranchInputs, NativeSparseAttention
from nsa.layers.rotary import default_frequencies, rotate, rotation

__all__ = [
    "BranchInputs",
    "Compressor",
    "DenseAttention",
    "NativeSparseAttention",
    "default_frequencies",
    "rotate",
    "rotation",
]
