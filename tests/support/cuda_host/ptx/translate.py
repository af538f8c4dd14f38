"""Translates PTX to C++ that runs on the emulator, so that compiler output and inline assembly run on the CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from . import arithmetic, memory, sm90, warp
from .parser import Brace, Instruction, Kernel, Label, Local, Module, Parameter, Registers, Statement, c_name, parse
from .scope import Scope, Unsupported, storage

_HANDLERS = {**arithmetic.HANDLERS, **memory.HANDLERS, **warp.HANDLERS, **sm90.HANDLERS}


@dataclass(frozen=True)
class Translation:
    """C++ text, the kernels' parameters by name, and the count of each unsupported opcode.

    An unsupported instruction fails with its name when it is executed; kernels that do not reach it run.
    """

    cpp: str
    parameters: dict[str, list[Parameter]]
    unsupported: Counter[str]


def translate(text: str, name: str = "module.ptx", *, watches_operands: bool = False) -> Translation:
    """Translate one PTX file.

    name: used in the emulator's reports with the PTX line number.
    watches_operands: report registers that change while a wgmma reads them. Triton's loops write such registers.
    """
    module = parse(text)
    unsupported: Counter[str] = Counter()
    kernels = [_kernel(module, kernel, name, unsupported, watches_operands) for kernel in module.kernels]
    ranges = ", ".join(f"{{{begin}, {end}}}" for begin, end in module.shared_ranges)
    dynamic = f"{{{module.static_shared_bytes}, 0xFFFFFFFFu}}"
    cpp = "\n".join(
        [
            '#include "cuda_host.h"',
            '#include "cuda_host/ptx.h"',
            "namespace {",
            "using namespace cuda_host;",
            "using namespace cuda_host::ptx;",
            f"constexpr SharedRange shared_ranges[] = {{{ranges + ', ' if ranges else ''}{dynamic}}};",
            *module.data.values(),
            *kernels,
            "}  // namespace",
        ]
    )
    return Translation(cpp, {k.name: k.parameters for k in module.kernels}, unsupported)


def _kernel(module: Module, kernel: Kernel, file: str, unsupported: Counter[str], watches_operands: bool) -> str:
    scope = Scope(module, kernel, watches_operands)
    lines = [f"void {c_name(kernel.name)}([[maybe_unused]] const uint8_t* parameters) {{"]
    lines.append(scope.warpgroup.declarations())
    for position, statement in enumerate(kernel.statements):
        if isinstance(statement, Label):
            lines.append(f"{c_name(statement.name)}:;")
        elif isinstance(statement, Brace):
            lines.append(statement.text + _labels_of_scope(kernel.statements, position))
        elif isinstance(statement, Registers):
            names = ", ".join(c_name(n) for n in statement.names)
            lines.append(f"[[maybe_unused]] {storage(statement.kind)} {names};" if names else "")
        elif isinstance(statement, Local):
            lines.append(f"alignas(16) unsigned char {c_name(statement.name)}[{statement.bytes}];")
        else:
            lines += [f'#line {statement.line} "{file}"', _instruction(scope, statement, unsupported)]
    static = module.static_shared_bytes
    lines += [
        "}",
        f"const RegisterPtxKernel register_{c_name(kernel.name)}"
        f'{{{{"{kernel.name}", {c_name(kernel.name)}, {kernel.parameter_bytes}, {static}}}}};',
    ]
    return "\n".join(lines)


def _labels_of_scope(statements: list[Statement], position: int) -> str:
    """Return the declaration of the labels in the scope that a brace opens: inline assembly repeats their names."""
    depth, names = 0, []
    for statement in statements[position:]:
        if isinstance(statement, Brace):
            depth += {"{": 1, "}": -1}[statement.text]
            if depth <= 0:
                break
        elif isinstance(statement, Label) and depth == 1:
            names.append(c_name(statement.name))
    return f" __label__ {', '.join(names)};" if names else ""


def _instruction(scope: Scope, instruction: Instruction, unsupported: Counter[str]) -> str:
    guard = ""
    if instruction.predicate:
        guard = f"if ({'!' if instruction.negated else ''}{scope.register(instruction.predicate)}) "
    handler = _HANDLERS.get(instruction.parts[0])
    try:
        if handler is None or arithmetic.has_unhonoured_modifier(instruction):
            raise Unsupported(instruction.opcode)
        code = handler(scope, instruction)
    except (Unsupported, KeyError, StopIteration):
        unsupported[instruction.opcode] += 1
        code = f'machine().fail("unsupported PTX instruction: {instruction.opcode}");'
    return f"{guard}{{ {code} {scope.warpgroup.after(instruction)} }}"
