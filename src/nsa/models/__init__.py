"""Hugging Face config and model, and conversion of dense checkpoints."""
