"""The check of head counts and widths that every attention module makes."""

from __future__ import annotations


def check_heads(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, value_head_dim: int
) -> None:
    """Positive integers, kv heads that divide the heads, an even ``head_dim``.

    Raises:
        ValueError: a value does not fit; the message names it.
    """
    sizes = {
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "value_head_dim": value_head_dim,
    }
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive int, got {value!r}.")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a divisor of num_heads = {num_heads}, since each kv head "
            f"serves a group of query heads, got {num_kv_heads}."
        )
    if head_dim % 2:
        raise ValueError(
            f"head_dim: expected an even number, since rotation turns pairs of channels, got "
            f"{head_dim}."
        )
