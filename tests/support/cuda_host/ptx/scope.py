"""Operands of one kernel as C++ expressions; registers hold bits that instructions interpret."""

from __future__ import annotations

import re

from .parser import BITS, Kernel, Local, Module, c_name
from .warpgroup_registers import WarpgroupRegisters

C_TYPES = {
    **{f"u{n}": f"uint{n}_t" for n in (8, 16, 32, 64)},
    **{f"b{n}": f"uint{n}_t" for n in (8, 16, 32, 64)},
    **{f"s{n}": f"int{n}_t" for n in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "f16": "Half",
    "bf16": "Bfloat16",
    "f16x2": "uint32_t",
    "bf16x2": "uint32_t",
    "pred": "bool",
}
_VARIABLES = {"%tid": "threadIdx", "%ctaid": "blockIdx", "%ntid": "blockDim", "%nctaid": "gridDim"}
_SPECIAL = {
    "%laneid": "lane()",
    "%warpid": "machine().current->warp",
    "WARP_SZ": "32",
    # Clocks and placement are constants here; kernels may read them but must not depend on them.
    **dict.fromkeys(("%clock", "%clock64", "%globaltimer", "%smid"), "0"),
}


class Unsupported(Exception):
    """The emulator does not support an instruction or operand."""


def storage(kind: str) -> str:
    """Return the type of a register that holds `kind`."""
    return "bool" if kind == "pred" else f"uint{BITS[kind]}_t"


class Scope:
    """The names of one kernel.

    watches_operands: whether registers that a wgmma reads may not change before its wait, as the PTX manual demands.
    """

    def __init__(self, module: Module, kernel: Kernel, watches_operands: bool) -> None:
        self.module = module
        self.watches_operands = watches_operands
        self.parameters = {p.name: p.offset for p in kernel.parameters}
        self.locals = {s.name for s in kernel.statements if isinstance(s, Local)}
        self.warpgroup = WarpgroupRegisters(kernel.statements)

    def register(self, name: str) -> str:
        """Return the C++ variable of a register, or the value of a special register."""
        part = re.fullmatch(r"(%\w+)\.([xyz])", name)
        if part and part[1] in _VARIABLES:
            return f"uint32_t({_VARIABLES[part[1]]}.{part[2]})"
        if name in _SPECIAL:
            return _SPECIAL[name]
        if not re.fullmatch(r"%?[\w$]+", name):
            raise Unsupported(f"operand {name}")
        return c_name(name)

    def symbol(self, name: str) -> str | None:
        """Return the address of a variable: an offset for shared memory, a pointer for others."""
        if name in self.module.shared:
            offset = self.module.shared[name]
            return f"uint64_t({self.module.static_shared_bytes if offset is None else offset})"
        if name in self.module.data or name in self.locals:
            return f"uint64_t({c_name(name)})"
        if name in self.parameters:
            return f"uint64_t(parameters + {self.parameters[name]})"
        return None

    def read(self, operand: str, kind: str) -> str:
        """Return an operand as a value of `kind`."""
        bits, c_type = BITS[kind], C_TYPES[kind]
        if kind == "pred":
            if operand.startswith("!"):
                return f"(!{self.register(operand[1:])})"
            return str(int(operand != "0")) if operand.lstrip("-").isdigit() else self.register(operand)
        single = re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand)
        double = re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand)
        if single:
            value = f"0x{single[1]}u"
        elif double:
            value = f"0x{double[1]}ull"
        elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            value = f"({operand.rstrip('U')}{'ll' if operand.startswith('-') else 'ull'})"
        else:
            value = self.symbol(operand) or self.register(operand)
        if kind in ("f32", "f64"):
            return f"std::bit_cast<{c_type}>(uint{bits}_t({value}))"
        if kind in ("f16", "bf16"):
            return f"{c_type}{{uint16_t({value})}}"
        return f"{c_type}({value})"

    def write(self, destination: str, expression: str, kind: str) -> str:
        """Return a statement that stores a value of `kind`."""
        if destination == "_":
            return f"(void)({expression});"
        register = self.register(destination)
        if kind == "pred":
            return f"{register} = {expression};"
        if kind in ("f32", "f64"):
            return f"{register} = std::bit_cast<uint{BITS[kind]}_t>({C_TYPES[kind]}({expression}));"
        if kind in ("f16", "bf16"):
            return f"{register} = ({expression}).bits;"
        return f"{register} = {C_TYPES[kind]}({expression});"

    def address(self, operand: str) -> str:
        """Return `[base + offset]` as a number."""
        match = re.fullmatch(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if match is None:
            raise Unsupported(f"address {operand}")
        base, offset = match[1], match[2] or "0"
        if base.isdigit():
            return f"uint64_t({base} + {offset}ll)"
        return f"uint64_t({self.symbol(base) or self.register(base)} + ({offset}ll))"

    def pointer(self, operand: str, space: str, size: int) -> str:
        """Return a checked host pointer to `size` bytes. Shared addresses are offsets, all others host addresses."""
        if space == "shared":
            return f"shared_pointer(shared_ranges, {self.address(operand)}, {size})"
        return f"global_pointer({self.address(operand)}, {size})"
