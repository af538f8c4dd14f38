"""Which registers a kernel's wgmma use while they are pending, and whether a wgmma.fence follows each write of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .parser import Instruction, Statement, c_name, vector


class WarpgroupRegisters:
    """The registers of a kernel that its wgmma read and write while they are pending.

    moved: the registers to which `mov` can bring a pending sum, sums included; empty where none is moved.
    """

    def __init__(self, statements: Sequence[Statement]) -> None:
        instructions = [s for s in statements if isinstance(s, Instruction)]
        products = [i for i in instructions if i.opcode.startswith("wgmma.mma_async")]
        sums = {name for i in products for name in vector(i.operands[0])}
        moves = [(i.operands[0], i.operands[1]) for i in instructions if i.parts[0] == "mov" and len(i.operands) == 2]
        reached, size = set(sums), 0
        while len(reached) > size:
            size = len(reached)
            reached |= {to for to, source in moves if source in reached and re.fullmatch(r"%\w+", to)}
        self.moved = sorted(reached) if reached != sums else []
        in_registers = {name for i in products if i.operands[1].startswith("{") for name in vector(i.operands[1])}
        self._tracked = sorted(reached | in_registers)
        self._names = set(self._tracked)

    def declarations(self) -> str:
        """Return the declarations of a flag for each register: written since the last wgmma.fence."""
        return " ".join(f"bool {_flag(name)} = false;" for name in self._tracked)

    def after(self, i: Instruction) -> str:
        """Return what follows an instruction that writes such registers."""
        if not self._names or not i.operands or i.parts[0] in ("st", "red", "wgmma", "bra"):
            return ""
        written = [name for name in vector(i.operands[0]) if name in self._names]
        moved = i.parts[0] == "mov" and len(i.operands) == 2 and i.operands[1] in self._names
        return " ".join(f"{_flag(name)} = {_flag(i.operands[1]) if moved else 'true'};" for name in written)

    def clean(self) -> str:
        """Return what wgmma.fence does."""
        return " ".join(f"{_flag(name)} = false;" for name in self._tracked)

    def check(self, registers: Sequence[str]) -> str:
        """Return the check of a wgmma's registers."""
        flags = " || ".join(_flag(name) for name in registers)
        return f"if ({flags}) warpgroups().missing_fence(Where::current());"


def _flag(name: str) -> str:
    return f"written_{c_name(name)}"
