"""Training: data, tokenizer, packing, the loop."""
