"""What ptxas made of a kernel's products on tensor cores, read from ``nvdisasm``.

An operand that stays in registers for many steps of a loop is one that ptxas may lose: it has put
the operand of another product into the same registers, though the next step reads the first one
again. Nothing says so but the results.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# Of an instruction: whether it is predicated, its name, and what it works on.
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
# Predicates may come first; the first register is what is written, also of a product.
TARGET = re.compile(r"(?:!?U?P\w+, )*R(\d+)\b")
PRODUCT = re.compile(r"R\d+, R(\d+), gdesc")
WRITES_NOTHING = re.compile(r"(ST|RED|BAR|BRA|BRX|EXIT|SYNCS|R2UR|UT|MEMBAR|FENCE|WARP|DEPBAR)")


class Instruction(NamedTuple):
    """One line of machine code."""

    predicated: bool
    name: str
    operands: str

    def written(self) -> int:
        """The registers it writes, as bits."""
        target = TARGET.match(self.operands)
        if target is None or WRITES_NOTHING.match(self.name):
            return 0
        count = 1
        if product := re.match(r"HGMMA\.64x(\d+)x", self.name):
            count = int(product.group(1)) // 2
        elif re.search(r"\.128\b|\.M88\.4\b", self.name):
            count = 4
        elif re.search(r"\.64\b|\.WIDE\b", self.name):
            count = 2
        return ((1 << count) - 1) << int(target.group(1))


def overwritten_operands(disassembly: str) -> list[str]:
    """Products with an operand that was loaded from shared memory on one way to them only.

    Each is named by its line. Of every register it is followed, along all branches, whether what
    it holds was loaded by ``LDSM`` or came from elsewhere. What a product reads is all of one kind.
    """
    code, labels = _parse(disassembly)
    # Registers that may hold a loaded operand, and those that may hold anything else.
    reaching = [(0, 0)] * len(code)
    reached = {0}
    waiting = [0]
    while waiting:
        i = waiting.pop()
        instruction = code[i]
        loaded, other = reaching[i]
        written = instruction.written()
        if not instruction.predicated:
            loaded, other = loaded & ~written, other & ~written
        if instruction.name.startswith("LDSM"):
            loaded |= written
        else:
            other |= written
        for j in _next(i, instruction, labels):
            merged = (reaching[j][0] | loaded, reaching[j][1] | other)
            if j not in reached or merged != reaching[j]:
                reaching[j] = merged
                reached.add(j)
                waiting.append(j)
    found = []
    for i in sorted(reached):
        operand = PRODUCT.match(code[i].operands)
        if operand and code[i].name.startswith("HGMMA"):
            quad = 0b1111 << int(operand.group(1))
            if reaching[i][0] & reaching[i][1] & quad:
                found.append(f"{code[i].name} {code[i].operands}")
    return found


def _parse(disassembly: str) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(code)
        elif found := INSTRUCTION.search(line):
            predicate, name, operands = found.groups()
            code.append(Instruction(predicate is not None, name, operands))
    return code, labels


def _next(i: int, instruction: Instruction, labels: dict[str, int]) -> Iterator[int]:
    """Where it goes on after instruction ``i``."""
    ends = instruction.name.startswith(("BRA", "BRX", "EXIT", "RET"))
    if ends:
        yield from (labels[name] for name in re.findall(r"\.L_x_\d+", instruction.operands))
    if not ends or instruction.predicated:
        yield i + 1
