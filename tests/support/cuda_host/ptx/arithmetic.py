"""Instructions on registers: arithmetic, logic, comparison, conversion."""

from __future__ import annotations

from collections.abc import Callable

from .parser import BITS, Instruction, vector
from .scope import C_TYPES, Scope, Unsupported, storage

Handler = Callable[[Scope, Instruction], str]

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%"}
_ROUNDINGS = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
_UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

UNHONOURED = frozenset(("rz", "rm", "rp", "rna", "rs", "ftz", "relu", "satfinite", "NaN", "xorsign"))
"""Modifiers that change a result and that no handler implements: each handler rounds to nearest even, keeps subnormals,
and takes the number if one operand of min or max is NaN. Instructions with these are unsupported, except fma.ftz.f32,
which libdevice's logarithm uses."""


def has_unhonoured_modifier(i: Instruction) -> bool:
    """Whether a modifier of the instruction would be ignored by its translation."""
    honoured = {"ftz"} if i.parts[0] == "fma" and i.parts[-1] == "f32" else set()
    return bool(UNHONOURED.intersection(i.parts) - honoured)


def _half(kind: str) -> str:
    return "Bfloat16" if kind.startswith("bf16") else "Half"


def _is_half(kind: str) -> bool:
    return kind in ("f16", "bf16", "f16x2", "bf16x2")


def _raw(kind: str) -> str:
    return "b32" if kind.endswith("x2") else "b16"


def _wide(kind: str) -> str:
    """Return the C++ type of twice the width, in which a product is exact."""
    bits, signed = BITS[kind], kind.startswith("s")
    if bits == 64:
        return "__int128" if signed else "unsigned __int128"
    return f"{'int' if signed else 'uint'}{2 * bits}_t"


def _binary(scope: Scope, i: Instruction) -> str:
    operation, kind = i.parts[0], i.parts[-1]
    destination, a, b = i.operands
    sign = _SIGNS.get(operation)
    if _is_half(kind):
        function = f"x {sign} y" if sign else f"std::f{operation}(x, y)"
        expression = (
            f"map_halves<{_half(kind)}>({scope.read(a, 'b32')}, {scope.read(b, 'b32')}, "
            f"[](float x, float y) {{ return {function}; }})"
        )
        return scope.write(destination, expression, _raw(kind))
    x, y = scope.read(a, kind), scope.read(b, kind)
    if kind in ("f32", "f64"):
        expression = f"{x} {sign} {y}" if sign else f"std::f{operation}({x}, {y})"
        return scope.write(destination, f"saturate({expression})" if "sat" in i.parts else expression, kind)
    if operation == "mul":
        product = f"{_wide(kind)}({x}) * {_wide(kind)}({y})"
        if "wide" in i.parts:
            return f"{scope.register(destination)} = {product};"
        return scope.write(destination, f"({product}) >> {BITS[kind]}" if "hi" in i.parts else product, kind)
    if operation in ("min", "max"):
        return scope.write(destination, f"std::{operation}<{C_TYPES[kind]}>({x}, {y})", kind)
    if operation in ("div", "rem"):
        return scope.write(destination, f"{x} {sign} {y}", kind)
    unsigned = storage(kind)
    return scope.write(destination, f"{unsigned}({x}) {sign} {unsigned}({y})", kind)


def _multiply_add(scope: Scope, i: Instruction) -> str:
    kind = i.parts[-1]
    destination, a, b, c = i.operands
    if kind in ("f32", "f64"):
        values = [scope.read(operand, kind) for operand in (a, b, c)]
        if "ftz" in i.parts:
            flushed = ", ".join(f"flush_subnormal({value})" for value in values)
            return scope.write(destination, f"flush_subnormal(std::fma({flushed}))", kind)
        return scope.write(destination, f"std::fma({', '.join(values)})", kind)
    if _is_half(kind):
        operands = ", ".join(scope.read(o, "b32") for o in (a, b, c))
        return scope.write(destination, f"fma_halves<{_half(kind)}>({operands})", _raw(kind))
    product = f"{_wide(kind)}({scope.read(a, kind)}) * {_wide(kind)}({scope.read(b, kind)})"
    if "wide" in i.parts:
        return f"{scope.register(destination)} = {product} + {scope.read(c, kind[0] + str(2 * BITS[kind]))};"
    if "hi" in i.parts:
        product = f"({product} >> {BITS[kind]})"
    return scope.write(destination, f"{product} + {scope.read(c, kind)}", kind)


def _logic(scope: Scope, i: Instruction) -> str:
    kind = i.parts[-1]
    sign = {"and": "&", "or": "|", "xor": "^"}[i.parts[0]]
    return scope.write(
        i.operands[0], f"{scope.read(i.operands[1], kind)} {sign} {scope.read(i.operands[2], kind)}", kind
    )


def _unary(scope: Scope, i: Instruction) -> str:
    operation, kind = i.parts[0], i.parts[-1]
    value = scope.read(i.operands[1], "b32" if _is_half(kind) else kind)
    if _is_half(kind):
        function = {"neg": "-x", "abs": "std::fabs(x)"}[operation]
        expression = f"map_halves<{_half(kind)}>({value}, 0, [](float x, float) {{ return {function}; }})"
        return scope.write(i.operands[0], expression, _raw(kind))
    if operation == "not":
        return scope.write(i.operands[0], f"!{value}" if kind == "pred" else f"~{value}", kind)
    if operation == "neg" and kind not in ("f32", "f64"):
        return scope.write(i.operands[0], f"0 - {storage(kind)}({value})", kind)
    return scope.write(i.operands[0], f"-{value}" if operation == "neg" else f"std::abs({value})", kind)


def _shift(scope: Scope, i: Instruction) -> str:
    kind, bits = i.parts[-1], BITS[i.parts[-1]]
    value, count = scope.read(i.operands[1], kind), scope.read(i.operands[2], "u32")
    if i.parts[0] == "shr" and kind.startswith("s"):
        return scope.write(i.operands[0], f"{value} >> std::min<uint32_t>({count}, {bits - 1})", kind)
    sign = "<<" if i.parts[0] == "shl" else ">>"
    return scope.write(i.operands[0], f"{count} >= {bits} ? 0 : {value} {sign} {count}", kind)


def _funnel_shift(scope: Scope, i: Instruction) -> str:
    low, high, count = (scope.read(o, "b32") for o in i.operands[1:])
    left, wrap = str("l" in i.parts).lower(), str("wrap" in i.parts).lower()
    return scope.write(i.operands[0], f"funnel_shift({left}, {wrap}, {low}, {high}, {count})", "b32")


def _bit_field(scope: Scope, i: Instruction) -> str:
    kind = i.parts[-1]
    count = 1 if i.parts[0] == "bfe" else 2
    values = [scope.read(o, kind) for o in i.operands[1 : 1 + count]]
    places = [scope.read(o, "u32") for o in i.operands[1 + count :]]
    name = "extract_bits" if i.parts[0] == "bfe" else "insert_bits"
    return scope.write(i.operands[0], f"{name}<{C_TYPES[kind]}>({', '.join(values + places)})", kind)


def _function(name: str, *kinds: str) -> Handler:
    """Return a handler that applies a function to operands read as `kinds`; `t` is the instruction's type."""

    def handler(scope: Scope, i: Instruction) -> str:
        own = i.parts[-1]
        values = [scope.read(o, own if k == "t" else k) for o, k in zip(i.operands[1:], kinds, strict=True)]
        return scope.write(i.operands[0], f"{name}({', '.join(values)})", own)

    return handler


def _count(scope: Scope, i: Instruction) -> str:
    name = {"popc": "std::popcount", "clz": "std::countl_zero"}[i.parts[0]]
    return scope.write(i.operands[0], f"{name}({scope.read(i.operands[1], i.parts[-1])})", "u32")


def _select(scope: Scope, i: Instruction) -> str:
    kind = i.parts[-1]
    a, b = (scope.read(o, kind) for o in i.operands[1:3])
    return scope.write(i.operands[0], f"{scope.read(i.operands[3], 'pred')} ? {a} : {b}", kind)


def _compare(scope: Scope, i: Instruction) -> str:
    kind, comparison = i.parts[-1], i.parts[1]
    x, y = scope.read(i.operands[1], kind), scope.read(i.operands[2], kind)
    if _is_half(kind):
        x, y, kind = f"float({x})", f"float({y})", "f32"
    is_float = kind in ("f32", "f64")
    unordered = f"(std::isnan({x}) || std::isnan({y}))"
    if comparison in ("num", "nan"):
        result = unordered if comparison == "nan" else f"!{unordered}"
    else:
        accepts_nan = is_float and comparison.endswith("u")
        base = comparison[:-1] if accepts_nan else _UNSIGNED_COMPARISONS.get(comparison, comparison)
        result = f"({x} {_COMPARISONS[base]} {y})"
        if accepts_nan:
            result = f"({result} || {unordered})"
        elif is_float and base == "ne":  # C++'s != is true for NaN, PTX's ordered ne is false
            result = f"({result} && !{unordered})"
    combine = next((p for p in i.parts[2:] if p in ("and", "or", "xor")), None)
    if combine:
        sign = {"and": "&&", "or": "||", "xor": "!="}[combine]
        result = f"{result} {sign} {scope.read(i.operands[3], 'pred')}"
    first, _, second = i.operands[0].partition("|")
    return scope.write(first, result, "pred") + (scope.write(second, f"!({result})", "pred") if second else "")


def _convert(scope: Scope, i: Instruction) -> str:
    to, source, parts = i.parts[-2], i.parts[-1], i.parts
    if to in ("bf16x2", "f16x2"):
        high, low = (f"{_half(to)}::round({scope.read(o, 'f32')})" for o in i.operands[1:3])
        return scope.write(i.operands[0], f"uint32_t({high}.bits) << 16 | {low}.bits", "b32")
    value = scope.read(i.operands[1], source)
    if to in ("bf16", "f16"):
        return scope.write(i.operands[0], f"{_half(to)}::round(float({value}))", to)
    rounding = next((p for p in parts if p in _ROUNDINGS), None)
    if to in ("f32", "f64"):
        if source in ("f32", "f64", "f16", "bf16") and rounding:
            value = f"{_ROUNDINGS[rounding]}({value})"
        value = f"{C_TYPES[to]}({value})"
        return scope.write(i.operands[0], f"saturate({value})" if "sat" in parts else value, to)
    if source in ("f32", "f64", "f16", "bf16"):
        if rounding is None:
            raise Unsupported(i.opcode)
        return scope.write(i.operands[0], f"to_integer<{C_TYPES[to]}>({_ROUNDINGS[rounding]}(double({value})))", to)
    if "sat" in parts:
        return scope.write(i.operands[0], f"saturate_integer<{C_TYPES[to]}>({value})", to)
    # A narrow result is extended to the register's width with its own sign.
    return f"{scope.register(i.operands[0])} = {C_TYPES[to]}({value});"


def _move(scope: Scope, i: Instruction) -> str:
    kind = i.parts[-1]
    destination, source = i.operands
    if destination.startswith("{"):
        names = vector(destination)
        bits = BITS[kind] // len(names)
        value = scope.read(source, f"b{BITS[kind]}")
        return " ".join(
            f"{scope.register(n)} = uint{bits}_t({value} >> {bits * k});" for k, n in enumerate(names) if n != "_"
        )
    if source.startswith("{"):
        names = vector(source)
        bits, whole = BITS[kind] // len(names), f"uint{BITS[kind]}_t"
        joined = " | ".join(f"{whole}({scope.read(n, f'b{bits}')}) << {bits * k}" for k, n in enumerate(names))
        return scope.write(destination, joined, f"b{BITS[kind]}")
    return scope.write(destination, scope.read(source, kind), kind)


def _approximate(expression: str) -> Handler:
    """Return a handler for functions that a GPU approximates; they are exact to fp32 here and differ in the last
    bits."""

    def handler(scope: Scope, i: Instruction) -> str:
        kind = i.parts[-1]
        return scope.write(i.operands[0], expression.format(scope.read(i.operands[1], kind)), kind)

    return handler


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "rem", "min", "max"), _binary),
    **dict.fromkeys(("mad", "fma"), _multiply_add),
    **dict.fromkeys(("and", "or", "xor"), _logic),
    **dict.fromkeys(("not", "neg", "abs"), _unary),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("bfe", "bfi"), _bit_field),
    **dict.fromkeys(("popc", "clz"), _count),
    "shf": _funnel_shift,
    "prmt": _function("__byte_perm", "t", "t", "t"),
    "lop3": _function("lop3", "t", "t", "t", "u32"),
    "brev": _function("reverse_bits", "t"),
    "selp": _select,
    "setp": _compare,
    "cvt": _convert,
    "mov": _move,
    "rcp": _approximate("1 / {}"),
    "sqrt": _approximate("std::sqrt({})"),
    "rsqrt": _approximate("1 / std::sqrt({})"),
    "ex2": _approximate("std::exp2({})"),
    "lg2": _approximate("std::log2({})"),
    "sin": _approximate("std::sin({})"),
    "cos": _approximate("std::cos({})"),
    "tanh": _approximate("std::tanh({})"),
}
