"""Device code: Triton kernels and their launch tables. Never imports PyTorch."""
