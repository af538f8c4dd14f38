"""Facts of a cubin: registers, spills, and counts of SASS instructions."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from .early_waits import Instruction, early_waits

TOOL_SECONDS = 300
"""Time limit of a disassembler in seconds, far above its need, so that a stuck one fails the report."""

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_LINE = re.compile(
    r"^(?:(?P<label>\.L_x?_?\d+):|\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[A-Z][A-Z0-9_.]*)(?P<rest>.*))$",
    re.MULTILINE,
)
_TARGET = re.compile(r"`\((\.L_x?_?\d+)\)")
_USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")

TENSOR_CORE = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}


@dataclass(frozen=True)
class Facts:
    """Static facts of one kernel in a cubin.

    registers: per thread.   stack: bytes of local memory per thread, spills included.
    instructions: opcode with modifiers -> count, padding NOPs left out.
    loops: the instructions of each loop, from a label to a branch back to it.
    static_shared: bytes of shared memory that need no launch argument.
    early_waits: waits for memory at the head of the main loop, counted by early_waits.py.
    """

    registers: int
    stack: int
    instructions: Counter[str]
    loops: tuple[Counter[str], ...]
    static_shared: int = 0
    early_waits: int = 0

    @property
    def total(self) -> int:
        """Return the number of all instructions of the kernel."""
        return sum(self.instructions.values())

    def count(self, prefix: str) -> int:
        """Return the number of instructions whose opcode is `prefix` or starts with `prefix` and a dot."""
        return sum(n for op, n in self.instructions.items() if op == prefix or op.startswith(prefix + "."))

    @property
    def spills(self) -> int:
        """Return the number of loads and stores of local memory, to which the register allocator spills."""
        return self.count("LDL") + self.count("STL")

    @property
    def tensor_core(self) -> tuple[str, int]:
        """Return (family of tensor-core instructions, count), or ("", 0)."""
        for opcode, family in TENSOR_CORE.items():
            if self.count(opcode):
                return family, self.count(opcode)
        return "", 0

    @property
    def main_loop(self) -> int:
        """Instructions of the main loop: the smallest of those with most asynchronous copies; 0 without any."""
        return self.hottest_loop("LDGSTS")[0]

    def hottest_loop(self, opcode: str) -> tuple[int, int]:
        """Return (instructions, of these `opcode`) of the smallest loop with most of `opcode`; (0, 0) without any."""
        counted = [
            (sum(n for op, n in loop.items() if op.split(".")[0] == opcode), -sum(loop.values()))
            for loop in self.loops
            if not loop["EXIT"]  # of a branch back from code behind the kernel's end, such as a repeated wait
        ]
        most, size = max(counted, default=(0, 0))
        return (-size, most) if most else (0, 0)

    @property
    def wide_loads(self) -> int:
        """Return the number of 16-byte loads from global memory, synchronous or into shared memory."""
        return sum(n for op, n in self.instructions.items() if op.startswith(("LDG", "LDGSTS")) and ".128" in op)

    @property
    def narrow_copies(self) -> int:
        """Return the number of cp.async of less than 16 bytes, which copy single elements or half of a lane's
        maximum.
        """
        return sum(n for op, n in self.instructions.items() if op.startswith("LDGSTS") and ".128" not in op)


@functools.cache
def facts_of(cubin: bytes, name: str) -> Facts:
    """Disassemble the function `name` of a cubin, with a cache, because many cases launch the same kernel."""
    return all_facts(cubin, [name])[name]


def all_facts(cubin: bytes, names: Sequence[str] | None = None) -> dict[str, Facts]:
    """Disassemble a cubin once; return the facts of the functions `names`, or of all, by mangled name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = _run("nvdisasm", "-c", str(path))
        usage = _run("cuobjdump", "-res-usage", str(path))
    found = {m[1]: m for m in _USAGE.finditer(usage)}
    return {name: _facts(listing, name, found[name]) for name in (found if names is None else names)}


def _facts(listing: str, name: str, usage: re.Match[str]) -> Facts:
    section = listing.split(f".section\t.text.{name},", 1)[-1].split(".section\t", 1)[0]
    body: list[Instruction] = []
    labels: dict[str, int] = {}
    loops: list[list[Instruction]] = []
    for match in _LINE.finditer(section):
        if match["label"]:
            labels[match["label"]] = len(body)
            continue
        if match["op"] == "NOP":
            continue
        body.append(Instruction(match["op"], match["rest"]))
        target = _TARGET.search(match["rest"]) if match["op"].startswith("BRA") else None
        if target and target[1] in labels and labels[target[1]] < len(body) - 1:
            loops.append(body[labels[target[1]] :])
    return Facts(
        registers=int(usage[2]),
        stack=int(usage[3]) + int(usage[5]),
        instructions=Counter(one.op for one in body),
        loops=tuple(Counter(one.op for one in loop) for loop in loops),
        static_shared=int(usage[4]),
        early_waits=early_waits(_main_loop(loops)),
    )


def _main_loop(loops: Sequence[Sequence[Instruction]]) -> Sequence[Instruction]:
    """The smallest of the loops that have most asynchronous copies into shared memory; empty without any."""

    def copies(loop: Sequence[Instruction]) -> int:
        return sum(one.op.startswith(("LDGSTS", "UTMALDG")) for one in loop)

    candidates = [loop for loop in loops if copies(loop) and all(one.op != "EXIT" for one in loop)]
    return max(candidates, key=lambda loop: (copies(loop), -len(loop)), default=())


def _run(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TOOL_SECONDS).stdout
