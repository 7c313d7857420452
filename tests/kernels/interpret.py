"""Runs one operation's kernels in Triton's interpreter on small cases, against the oracle.

``TRITON_INTERPRET=1 python -m tests.kernels.interpret OPERATION``. The variable has to be set
before the kernels are imported: hence a process of its own.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from tests import cases
from tests.cases import SMALL, WIDE, Case
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

from nsa import ops
from nsa.ops.launch.block_lists import invert
from nsa.ops.launch.select_blocks import _top_blocks, union_blocks
from nsa.ops.launch.sums import sum_parts
from nsa.ops.launch.tiles import QueryTiles

# The module, whose name in its package is that of its function.
SELECT_BLOCKS = sys.modules["nsa.ops.launch.select_blocks"]
NARROW = replace(SMALL, block_size=12)  # Three strides of four, not a power of two.
CASES = [
    Case(name="empty", lengths=(0,)),
    Case(name="one-token", lengths=(1, 1), dv=7),
    Case(name="below-a-block", lengths=(3,), group=3, kv_heads=1),
    Case(name="selection-covers-all", lengths=(24, 24), group=3, dk=5),
    Case(name="odd-batch", lengths=(75, 75)),
    Case(name="one-head-a-group", lengths=(70,), group=1, kv_heads=2),
    Case(name="many-heads-a-group", lengths=(33,), group=16, kv_heads=1),
    Case(name="equal-block-sizes", lengths=(41,), config=WIDE),
    Case(name="three-strides-a-block", lengths=(71,), config=NARROW),
    Case(name="offset", lengths=(5, 5), offset=43),
    Case(name="spare-keys", lengths=(29, 29), offset=4, spare=(9, 2)),
    Case(name="endless-window", lengths=(21,), config=replace(SMALL, window_size=2**40)),
    Case(name="float16", lengths=(37,), dtype=torch.float16),
    Case(name="packed", lengths=(0, 1, 39, 1, 29, 0), packed=True),
]


class AnyOrder(InterpreterBuilder):
    """Runs the programs of a launch in an order of chance, as a GPU may.

    In ascending order a program that writes into what a later one owns goes unnoticed.
    """

    def set_grid_dim(self, nx, ny, nz):
        super().set_grid_dim(nx, ny, nz)
        places = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
        self.places = iter(random.sample(places, len(places)))

    def set_grid_idx(self, x, y, z):
        super().set_grid_idx(*next(self.places))


def check_union_blocks() -> None:
    """Every token finds its blocks in the list of its tile; halves take turns where they should."""
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(2, 21, 2, 1)
    for tokens in (2, 8, 16):
        tiles = QueryTiles.of(q, None, tokens)
        chosen = torch.rand(2, 21, 2, 30, generator=generator).argsort(-1)[..., :6].to(torch.int32)
        chosen[..., 4:] = torch.where(chosen[..., 4:] < 15, chosen[..., 4:], -1)
        for turns in (False, True):
            union = union_blocks(chosen, q, tiles, turns)
            for tile in range(tiles.num_tiles):
                sequence, first = divmod(tile, tiles.num_tiles // 2)
                first *= tokens
                for head in range(2):
                    count = int(union.counts[tile, head])
                    blocks = union.blocks[tile, head, :count].tolist()
                    words = union.bits[tile, head, : count + 1].diff().tolist()
                    for token in range(first, min(first + tokens, 21)):
                        mine = {
                            b for b, w in zip(blocks, words, strict=True) if w >> token - first & 1
                        }
                        asked = set(chosen[sequence, token, head].tolist()) - {-1}
                        assert mine == asked, (tokens, turns, tile, head, token)
                    assert len(set(blocks)) == count
                    if turns:
                        check_turns(words, tokens // 2)
                    else:
                        assert blocks == sorted(blocks)


def check_turns(words: list[int], half: int) -> None:
    """Of both halves first, then of each in turns, as long as both have any."""
    whose = ["ab"[word >> half != 0] for word in words if not (word >> half and word % (1 << half))]
    both = len(words) - len(whose)
    assert all(word >> half and word % (1 << half) for word in words[:both])
    turns = 2 * min(whose.count("a"), whose.count("b"))
    assert "".join(whose[:turns]) == "ab" * (turns // 2)


def check_block_lists() -> None:
    """A block has the list of the rows that chose it, ascending, whatever its number takes."""
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(2, 7, 4, 1)
    for num_blocks in (30, 9000):  # Of two sequences and two heads: 120 lists, and 36,000.
        chosen = torch.rand(2, 7, 2, num_blocks, generator=generator).argsort(-1)[..., :6]
        chosen = chosen.to(torch.int32)
        chosen[..., 4:] = torch.where(chosen[..., 4:] % 2 == 0, chosen[..., 4:], -1)
        chosen[0, 0, 1] = torch.tensor([num_blocks - 1, 0, -1, -1, -1, -1])
        blocks = QueryTiles.of(q, None, 16, num_blocks * 16)
        entries, offsets = invert(chosen, q, blocks, num_blocks * 16)
        assert entries.dtype == offsets.dtype == torch.int32
        expected: dict[int, list[int]] = {}
        for sequence, token, head in itertools.product(range(2), range(7), range(2)):
            for block in set(chosen[sequence, token, head].tolist()) - {-1}:
                number = (head * 2 + sequence) * num_blocks + block
                expected.setdefault(number, []).append(sequence * 7 + token)
        for number in range(4 * num_blocks):
            found = entries[offsets[number] : offsets[number + 1]].tolist()
            assert found == expected.get(number, []), (num_blocks, number)


def check_sums() -> None:
    """Parts are added one after the other, in float32: bit for bit as in a loop."""
    generator = torch.Generator().manual_seed(0)
    for count, shapes in ((1, [(5, 3)]), (8, [(33, 2), (33, 5)]), (19, [(3, 700), (3, 128)])):
        parts = [torch.randn(count, *shape, generator=generator) for shape in shapes]
        for found, side in zip(sum_parts(parts, torch.float16), parts, strict=True):
            expected = torch.zeros(side.shape[1:])
            for part in side:
                expected += part
            assert torch.equal(found, expected.half())


def main(operation: str) -> None:
    """Raises AssertionError on the first case that is off."""
    random.seed(0)
    interpreter_builder.__class__ = AnyOrder
    alone = {
        "union_blocks": check_union_blocks,
        "block_lists": check_block_lists,
        "sums": check_sums,
    }
    if operation in alone:
        alone[operation]()
        return
    check = getattr(cases, f"check_{operation}")
    kernels = functools.partial(getattr(ops, operation), backend="kernel")
    for case in CASES:
        print(operation, case.name, flush=True)
        check(kernels, case)
    if operation in ("select_blocks", "nsa_attention"):
        check_short_sequences(check, kernels)


def check_short_sequences(check: Callable, kernels: Callable) -> None:
    """Packed sequences that all fit the selection: nothing is scored if that is known."""
    case = Case(name="short-sequences", lengths=(24, 0, 1, 24, 17, 23), packed=True, dv=7)
    with mock.patch.object(SELECT_BLOCKS, "_top_blocks") as scored:
        check(functools.partial(kernels, max_seqlen=24), case)
        few = replace(case, lengths=(7, 0, 17))  # All together, whatever is said.
        check(functools.partial(kernels, max_seqlen=1000), few)
    assert not scored.called
    with mock.patch.object(SELECT_BLOCKS, "_top_blocks", wraps=_top_blocks) as scored:
        check(functools.partial(kernels, max_seqlen=25), case)
    assert scored.called


if __name__ == "__main__":
    main(sys.argv[1])
