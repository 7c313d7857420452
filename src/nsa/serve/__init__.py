"""Text in, text out: streaming generation and conversation."""
