"""Native Sparse Attention (arXiv 2502.11089) for training and inference."""

__version__ = "0.1.0"
