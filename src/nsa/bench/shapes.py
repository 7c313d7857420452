"""The shapes that are measured: heads, widths and geometry under one name each."""

from __future__ import annotations

from dataclasses import dataclass, field

from nsa.config import NSAConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One attention layer, batch 1.

    Args:
        name: what `--shape` takes.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        key_dim: width of queries and keys.
        value_dim: width of values.
        seq_lens: lengths measured unless others are asked for, in tokens.
        config: geometry of the three branches.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    seq_lens: tuple[int, ...]
    config: NSAConfig = field(default_factory=NSAConfig.paper)


PAPER_LENGTHS = (8192, 16384, 32768, 65536, 131072)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="tiny",
            num_heads=4,
            num_kv_heads=2,
            key_dim=32,
            value_dim=32,
            seq_lens=(256, 512),
            config=NSAConfig.tiny(),
        ),
        Shape(
            name="laptop",
            num_heads=4,
            num_kv_heads=2,
            key_dim=64,
            value_dim=64,
            seq_lens=(1024, 2048, 4096),
        ),
        # A layer of configs/100m-16k.yaml.
        Shape(
            name="100m",
            num_heads=16,
            num_kv_heads=1,
            key_dim=64,
            value_dim=64,
            seq_lens=(1024, 2048, 4096, 8192, 16384),
        ),
        # The paper's heads (section 4.1) at the width every dense kernel supports.
        Shape(
            name="paper-d128",
            num_heads=64,
            num_kv_heads=4,
            key_dim=128,
            value_dim=128,
            seq_lens=PAPER_LENGTHS,
        ),
        # The paper's own widths.
        Shape(
            name="paper",
            num_heads=64,
            num_kv_heads=4,
            key_dim=192,
            value_dim=128,
            seq_lens=PAPER_LENGTHS,
        ),
        # A million tokens, with as many heads as fit one GPU forward and backward.
        Shape(
            name="million",
            num_heads=32,
            num_kv_heads=2,
            key_dim=128,
            value_dim=128,
            seq_lens=(1 << 20,),
        ),
        # The same query heads in groups of any size: fewer share what is read. Also at the paper's
        # widths and at narrow ones, in groups that Hopper's own kernels do not take, and at broad
        # and odd ones, which they do not take at all; tiles pad the latter. And groups of no power
        # of two, which tiles pad too.
        *(
            Shape(
                name=f"{widths}{name}-{size}",
                num_heads=num_heads,
                num_kv_heads=num_heads // size,
                key_dim=key_dim,
                value_dim=value_dim,
                seq_lens=(65536,),
            )
            for widths, key_dim, value_dim, sizes in (
                ("", 128, 128, (1, 2, 4, 8)),
                ("wide-", 192, 128, (1, 2, 4)),
                ("narrow-", 64, 64, (1, 2, 4)),
                ("broad-", 256, 256, (1, 2, 4, 8)),
                ("odd-", 96, 96, (8,)),
            )
            for name, num_heads, size in (
                *(("group", 32, size) for size in sizes),
                *(("padded-group", max(24, size), size) for size in (12, 24, 48)),
            )
        ),
    )
}
