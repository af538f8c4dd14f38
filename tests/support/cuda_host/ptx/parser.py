"""Parses PTX text to kernels as lists of statements, for the subset that nvcc and Triton emit for sm_80 and sm_90a."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

BITS = {
    **{kind + str(bits): bits for kind in "usb" for bits in (8, 16, 32, 64)},
    "f32": 32,
    "f64": 64,
    "f16": 16,
    "bf16": 16,
    "f16x2": 32,
    "bf16x2": 32,
    "pred": 1,
}
"""Width in bits of every type of a statement."""

SHARED_GAP = 128
"""Unused bytes after each shared variable, so that an access past its end is detected."""


@dataclass(frozen=True)
class Instruction:
    """An instruction `@!p opcode.modifiers a, b, c;`."""

    line: int
    opcode: str
    operands: tuple[str, ...]
    predicate: str = ""
    negated: bool = False

    @property
    def parts(self) -> list[str]:
        """The opcode and its modifiers."""
        return self.opcode.split(".")


@dataclass(frozen=True)
class Label:
    """A branch target."""

    name: str


@dataclass(frozen=True)
class Brace:
    """The start or end of a scope of registers."""

    text: str


@dataclass(frozen=True)
class Registers:
    """Declared registers of one type."""

    kind: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Local:
    """A per-thread array (`.local`), which a compiler emits for spills and run-time indexed arrays."""

    name: str
    bytes: int


Statement = Instruction | Label | Brace | Registers | Local


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter at its offset in the parameter block; `bytes` > 8 for a struct by value.

    words: offsets in the block of the 8-byte words that the kernel loads by the parameter's name. They hold addresses
    and numbers, and never a struct's padding.
    """

    name: str
    kind: str
    offset: int
    bytes: int
    words: tuple[int, ...] = ()


@dataclass
class Kernel:
    """A kernel, declared by .entry."""

    name: str
    parameters: list[Parameter]
    statements: list[Statement] = field(default_factory=list)

    @property
    def parameter_bytes(self) -> int:
        """Size of the parameter block."""
        return self.parameters[-1].offset + self.parameters[-1].bytes if self.parameters else 0


@dataclass
class Module:
    """A PTX file: kernels, shared variables at their offsets (None: the dynamic array), constant and global data."""

    kernels: list[Kernel] = field(default_factory=list)
    shared: dict[str, int | None] = field(default_factory=dict)
    shared_ranges: list[tuple[int, int]] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)

    @property
    def static_shared_bytes(self) -> int:
        """Return the offset at which the dynamic array starts."""
        return _align(self.shared_ranges[-1][1] + SHARED_GAP, 1024) if self.shared_ranges else 0


class _Parser:
    def __init__(self, text: str) -> None:
        # Comments are replaced by as many line breaks, so that line numbers do not change.
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        self.text = re.sub(r"//[^\n]*", "", text)
        self.module = Module()

    def parse(self) -> Module:
        outside, position = [], 0
        for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", self.text, re.S):
            end = _matching_brace(self.text, entry.end())
            outside.append(self.text[position : entry.start()])
            position = end + 1
            kernel = Kernel(entry[1], _parameters(entry[2]))
            self._body(kernel, self.text[entry.end() : end], 1 + self.text.count("\n", 0, entry.end()))
            kernel.parameters = [replace(p, words=_loaded_words(p, kernel.statements)) for p in kernel.parameters]
            self.module.kernels.append(kernel)
        outside.append(self.text[position:])
        for statement in ";".join(outside).split(";"):
            self._declare(statement)
        return self.module

    def _body(self, kernel: Kernel, body: str, first_line: int) -> None:
        pending, pending_line = "", first_line
        # A statement ends at ';'; braces around a vector operand are not scopes.
        body = re.sub(r"\{([^{};]*)\}", "\x01\\1\x02", body)
        for offset, raw in enumerate(body.split("\n")):
            for piece in re.split(r"(?<=[;{}])", raw):
                text = piece.strip()
                if not text or re.match(r"\.(loc|file|pragma)\b", text):
                    continue
                if not pending:
                    pending_line = first_line + offset
                pending = f"{pending} {text}".strip()
                label = re.match(r"([\w$]+):\s*(.*)$", pending)
                if label:
                    kernel.statements.append(Label(label[1]))
                    pending = label[2]
                if pending in ("{", "}"):
                    kernel.statements.append(Brace(pending))
                    pending = ""
                elif pending.endswith(";"):
                    self._statement(
                        kernel, pending[:-1].strip().replace("\x01", "{").replace("\x02", "}"), pending_line
                    )
                    pending = ""

    def _statement(self, kernel: Kernel, text: str, line: int) -> None:
        if not text or re.match(r"\.(loc|file|pragma)\b", text):
            return
        registers = re.match(r"\.reg\s+\.(\w+)\s+(.+)$", text)
        local = re.match(r"\.local\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d+)\]", text)
        if registers:
            kernel.statements.append(Registers(registers[1], _register_names(registers[2])))
        elif local:
            kernel.statements.append(Local(local[1], int(local[2])))
        elif text.startswith("."):
            self._declare(text)
        else:
            guard = re.match(r"@(!?)(\S+)\s+(.*)$", text)
            opcode, _, rest = (guard[3] if guard else text).partition(" ")
            operands = tuple(o.strip() for o in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[]+)+", rest))
            kernel.statements.append(
                Instruction(line, opcode, operands, guard[2] if guard else "", bool(guard and guard[1]))
            )

    def _declare(self, text: str) -> None:
        text = " ".join(text.split())
        match = re.search(r"\.(shared|const|global)\b(.*?)\.(\w+) ([\w$]+)(\[(\d*)\])?( = (\{.*\}|\S+))?$", text)
        if not match:
            return
        space, qualifiers, kind, name, array, count, _, value = match.groups()
        stated = re.search(r"\.align (\d+)", qualifiers)
        alignment = int(stated[1]) if stated else BITS[kind] // 8
        if space == "shared":
            if array and not count:
                self.module.shared[name] = None
                return
            ranges = self.module.shared_ranges
            begin = _align(ranges[-1][1] + SHARED_GAP if ranges else 0, max(alignment, 16))
            ranges.append((begin, begin + int(count or 1) * BITS[kind] // 8))
            self.module.shared[name] = begin
            return
        if value and not value.startswith("{"):
            value = "{" + value + "}"
        elements = f"uint{BITS[kind]}_t {c_name(name)}[{count or 1}]"
        values = re.sub(r"0[fF]([0-9A-Fa-f]{8})", r"0x\1u", value or "{}")
        self.module.data[name] = f"alignas({alignment}) static {elements} = {values};"


def parse(text: str) -> Module:
    """Parse `text` to a Module."""
    return _Parser(text).parse()


def c_name(name: str) -> str:
    """Return a C++ identifier for a PTX identifier."""
    return "ptx_" + name.replace("%", "").replace("$", "_").replace(".", "_")


def vector(operand: str) -> list[str]:
    """`{a, b}` -> [a, b]; `a` -> [a]."""
    return [item.strip() for item in operand.strip().strip("{}").split(",")]


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _matching_brace(text: str, position: int) -> int:
    depth = 1
    while True:
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
        position += 1


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for declaration in filter(str.strip, text.split(",")):
        match = re.search(r"\.param\s+(.*?)([\w$]+)(\[(\d+)\])?\s*$", " ".join(declaration.split()))
        if match is None:
            raise ValueError(f"not a kernel parameter: {declaration!r}")
        kind = next(t for t in re.findall(r"\.(\w+)", match[1]) if t in BITS)
        stated = re.match(r"\.align (\d+)", match[1])
        size = int(match[4] or 1) * BITS[kind] // 8
        offset = _align(offset, int(stated[1]) if stated else BITS[kind] // 8)
        parameters.append(Parameter(match[2], kind, offset, size))
        offset += size
    return parameters


def _loaded_words(parameter: Parameter, statements: Sequence[Statement]) -> tuple[int, ...]:
    words = set()
    for statement in statements:
        if not isinstance(statement, Instruction) or not statement.opcode.startswith("ld.param."):
            continue
        address = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", statement.operands[1])
        if address is None or address[1] != parameter.name or BITS[statement.parts[-1]] != 64:
            continue
        first = parameter.offset + int(address[2] or 0)
        words |= {first + 8 * i for i in range(statement.operands[0].count(",") + 1)}  # a vector has several
    return tuple(sorted(words))


def _register_names(text: str) -> tuple[str, ...]:
    names: list[str] = []
    for item in text.split(","):
        family = re.fullmatch(r"\s*(%?\w+)<(\d+)>\s*", item)
        names += [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [item.strip()]
    return tuple(names)
