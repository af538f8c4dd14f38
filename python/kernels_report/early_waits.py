"""Counts waits for memory at the start of a main loop: SASS instructions that use a value loaded in the same
iteration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """One SASS instruction: its opcode with modifiers, and its operands as text."""

    op: str
    operands: str


_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
_ADDRESS = re.compile(r"\[([^\]]*)\]")
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
GLOBAL_LOAD = ("LDG.", "LD.")
LOADS = (*GLOBAL_LOAD, "LDS", "LDGSTS")
NO_RESULT = ("ST", "LDGSTS", "BRA", "BAR", "EXIT", "ISETP", "FSETP", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "RED")
"""Opcodes whose first operand is not a general register that they write."""


def early_waits(loop: Sequence[Instruction]) -> int:
    """Count the instructions that wait for a global load of the same iteration before its products begin.

    loop: the instructions of the main loop in order. In a loop with tensor-core instructions, every earlier instruction
    that reads a just-loaded register is counted. In any other loop, only loads whose address depends on such a register
    are counted, because the products themselves read loaded values. Loads of 16 bytes are ignored there: they load
    activations, which are not addresses, and in code with branches the listing does not separate their registers.
    """
    products = next((i for i, one in enumerate(loop) if one.op.startswith(TENSOR_CORE)), None)
    loaded: set[int] = set()  # registers written by a global load of this iteration, or computed from one
    waits = 0
    for op, operands in loop[:products]:
        is_global_load = op.startswith(GLOBAL_LOAD) and (products is not None or ".128" not in op)
        written, read = _registers(op, operands)
        address = _read(" ".join(_ADDRESS.findall(operands)))
        if products is not None:
            waits += bool(read & loaded)
        else:
            waits += op.startswith(LOADS) and bool(address & loaded)
        if is_global_load or read & loaded:
            loaded |= written
        else:
            loaded -= written
    return waits


def _registers(op: str, operands: str) -> tuple[set[int], set[int]]:
    """Return (registers written, registers read) by an instruction."""
    first, _, rest = operands.partition(",")
    target = _REGISTER.match(first.strip())
    if target is None or op.startswith(NO_RESULT):
        return set(), _read(operands)
    width = 4 if ".128" in op else 2 if ".64" in op or ".WIDE" in op else 1
    return set(range(int(target[1]), int(target[1]) + width)), _read(rest)


def _read(text: str) -> set[int]:
    return {int(m[1]) + i for m in _REGISTER.finditer(text) for i in range(2 if m[2] else 1)}
