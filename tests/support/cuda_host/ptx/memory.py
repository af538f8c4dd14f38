"""Loads, stores, atomics, address conversion, asynchronous copies."""

from __future__ import annotations

from .arithmetic import Handler
from .parser import BITS, Instruction, vector
from .scope import C_TYPES, Scope, Unsupported
from .sm90 import copies_tensor, tensor_copy

_SPACES = ("param", "global", "shared", "local", "const")
_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas")


def _space(i: Instruction) -> str:
    named = (part.split("::")[0] for part in i.parts[1:])
    return next((part for part in named if part in _SPACES), "generic")


def _access(i: Instruction) -> tuple[int, int, str]:
    """Return (elements, bytes of each, the kind to move them as; signed loads extend their sign)."""
    kind = i.parts[-1]
    elements = next((int(part[1]) for part in i.parts if part in ("v2", "v4", "v8")), 1)
    return elements, BITS[kind] // 8, kind if kind.startswith("s") else f"b{BITS[kind]}"


def _load(scope: Scope, i: Instruction) -> str:
    elements, size, kind = _access(i)
    pointer = scope.pointer(i.operands[1], _space(i), size * elements)
    moves = " ".join(
        f"{scope.register(name)} = loaded[{k}];" for k, name in enumerate(vector(i.operands[0])) if name != "_"
    )
    # The pointer check has verified the alignment that the instruction requires.
    return (
        f"{C_TYPES[kind]} loaded[{elements}]; const auto* from = {pointer}; "
        f"__builtin_memcpy(loaded, __builtin_assume_aligned(from, {size}), sizeof loaded); {moves}"
    )


def _store(scope: Scope, i: Instruction) -> str:
    elements, size, kind = _access(i)
    values = ", ".join(scope.read(o, kind) for o in vector(i.operands[1]))
    pointer = scope.pointer(i.operands[0], _space(i), size * elements)
    return (
        f"const {C_TYPES[kind]} stored[{elements}] = {{{values}}}; auto* to = {pointer}; "
        f"__builtin_memcpy(__builtin_assume_aligned(to, {size}), stored, sizeof stored);"
    )


def _atomic(scope: Scope, i: Instruction) -> str:
    kind = i.parts[-1]
    operation = next(part for part in i.parts if part in _ATOMICS)
    space = "shared" if _space(i) == "shared" else "global"
    operands = list(i.operands)
    destination = operands.pop(0) if i.parts[0] == "atom" else None
    pointer = scope.pointer(operands[0], space, BITS[kind] // 8)
    values = ", ".join(scope.read(o, kind) for o in operands[1:])
    call = f"atomic_{operation}<{C_TYPES[kind]}>({pointer}, {values})"
    return scope.write(destination, call, kind) if destination else f"{call};"


def _convert_address(scope: Scope, i: Instruction) -> str:
    """Shared addresses are offsets into the block's memory, generic ones are host addresses."""
    value = scope.address(f"[{i.operands[1]}]")
    if "shared" in i.parts:
        value = f"generic_to_shared({value})" if "to" in i.parts else f"shared_to_generic({value})"
    return f"{scope.register(i.operands[0])} = {value};"


def _async_copy(scope: Scope, i: Instruction) -> str:
    parts, operands = i.parts, i.operands
    if copies_tensor(i):
        return tensor_copy(scope, i)
    if parts[1] != "async" or "bulk" in parts or "mbarrier" in parts:
        raise Unsupported(i.opcode)
    if "commit_group" in parts:
        return "cp_async_commit();"
    if "wait_group" in parts:
        return f"cp_async_wait({operands[0]});"
    if "wait_all" in parts:
        return "cp_async_commit(); cp_async_wait(0);"
    sizes = operands[2:-1] if "L2::cache_hint" in parts else operands[2:]
    source_bytes = scope.read(sizes[1], "u32") if len(sizes) > 1 else sizes[0]
    return (
        f"cp_async({scope.pointer(operands[0], 'shared', int(sizes[0], 0))}, "
        f"reinterpret_cast<const void*>({scope.address(operands[1])}), {sizes[0]}, {source_bytes});"
    )


def _cache_policy(scope: Scope, i: Instruction) -> str:
    """A cache policy is an opaque number that changes no value."""
    return scope.write(i.operands[0], "0", "b64")


def _nothing(scope: Scope, i: Instruction) -> str:
    return ";"


HANDLERS: dict[str, Handler] = {
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "cvta": _convert_address,
    "cp": _async_copy,
    "createpolicy": _cache_policy,
    **dict.fromkeys(("membar", "prefetch", "prefetchu", "nanosleep", "discard", "applypriority"), _nothing),
}
