"""Runs one operation's kernels in Triton's interpreter on small cases, against the oracle.

``TRITON_INTERPRET=1 python -m tests.kernels.interpret OPERATION``. The variable has to be set
before the kernels are imported: hence a process of its own.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

from tests import cases
from tests.cases import SMALL, WIDE, Case

from nsa import ops

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
    Case(name="packed", lengths=(0, 1, 39, 1, 29, 0), packed=True),
]


def main(operation: str) -> None:
    """Raises AssertionError on the first case that is off."""
    check = getattr(cases, f"check_{operation}")
    kernels = functools.partial(getattr(ops, operation), backend="kernel")
    for case in CASES:
        print(operation, case.name, flush=True)
        check(kernels, case)


if __name__ == "__main__":
    main(sys.argv[1])
