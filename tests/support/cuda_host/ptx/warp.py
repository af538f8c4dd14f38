"""Control flow, barriers, warp collectives, tensor-core instructions."""

from __future__ import annotations

from .arithmetic import Handler
from .parser import Instruction, c_name, vector
from .scope import C_TYPES, Scope, Unsupported


def _branch(scope: Scope, i: Instruction) -> str:
    return f"goto {c_name(i.operands[0])};"


def _return(scope: Scope, i: Instruction) -> str:
    return "return;"


def _trap(scope: Scope, i: Instruction) -> str:
    return 'machine().fail("trap");'


def _barrier(scope: Scope, i: Instruction) -> str:
    if "warp" in i.parts:
        return f"__syncwarp({scope.read(i.operands[0], 'u32')});"
    whole_block = len(i.operands) == 1 and i.operands[0] == "0"
    if "sync" in i.parts and whole_block:
        return 'machine().barrier(0, "bar.sync", Where::current());'
    if "red" in i.parts and i.operands[1] == "0" and len(i.operands) == 3:
        vote = f'machine().barrier({scope.read(i.operands[2], "pred")}, "bar.red", Where::current())'
        if "popc" in i.parts:
            return scope.write(i.operands[0], f"{vote} >> 2", "u32")
        return scope.write(i.operands[0], f"{vote} >> {0 if 'or' in i.parts else 1} & 1", "pred")
    raise Unsupported(i.opcode)


def _shuffle(scope: Scope, i: Instruction) -> str:
    destination, _, predicate = i.operands[0].partition("|")
    source, inside = {
        "bfly": ("self ^ b", "source <= limit"),
        "up": ("self - b", "source >= limit"),
        "down": ("self + b", "source <= limit"),
        "idx": ("(self & segment) | (b & ~segment)", "source <= limit"),
    }[i.parts[2]]
    value, b, c, mask = (scope.read(o, k) for o, k in zip(i.operands[1:], ("b32", "s32", "s32", "u32"), strict=True))
    return (
        f"const int self = lane(), b = {b} & 31, c = {c}, segment = c >> 8 & 31, "
        f"limit = (self & segment) | (c & 31 & ~segment), source = {source}; const bool inside = {inside}; "
        f'{scope.register(destination)} = shuffle<uint32_t>("shfl.sync", {mask}, {value}, inside ? source : self, '
        "Where::current());" + (f" {scope.register(predicate)} = inside;" if predicate else "")
    )


def _vote(scope: Scope, i: Instruction) -> str:
    mask = scope.read(i.operands[2], "u32")
    ballot = f"ballot({mask}, {scope.read(i.operands[1], 'pred')}, Where::current())"
    if "ballot" in i.parts:
        return scope.write(i.operands[0], ballot, "b32")
    if "any" in i.parts or "all" in i.parts:
        return scope.write(i.operands[0], f"{ballot} {'!= 0' if 'any' in i.parts else '== ' + mask}", "pred")
    raise Unsupported(i.opcode)


def _reduce(scope: Scope, i: Instruction) -> str:
    kind = i.parts[-1]
    combine = {"add": "a + b", "min": "std::min(a, b)", "max": "std::max(a, b)", "and": "a & b", "or": "a | b"}
    c_type = C_TYPES[kind]
    value, mask = scope.read(i.operands[1], kind), scope.read(i.operands[2], "u32")
    function = f"[]({c_type} a, {c_type} b) -> {c_type} {{ return {combine[i.parts[2]]}; }}"
    call = f'reduce_warp<{c_type}>("redux.sync", {mask}, {value}, {function}, Where::current())'
    return scope.write(i.operands[0], call, kind)


def _active_mask(scope: Scope, i: Instruction) -> str:
    return scope.write(i.operands[0], "kFullWarp", "b32")


def _ldmatrix(scope: Scope, i: Instruction) -> str:
    matrices = next(int(part[1]) for part in i.parts if part in ("x1", "x2", "x4"))
    # Only the addresses of 8 lanes per matrix are used; those of other lanes may be invalid.
    row = f"lane() < {matrices * 8} ? {scope.pointer(i.operands[1], 'shared', 16)} : nullptr"
    moves = " ".join(f"{scope.register(d)} = words.word[{k}];" for k, d in enumerate(vector(i.operands[0])))
    return f"const Words4 words = ldmatrix({matrices}, {str('trans' in i.parts).lower()}, {row}); {moves}"


def _stmatrix(scope: Scope, i: Instruction) -> str:
    matrices = next(int(part[1]) for part in i.parts if part in ("x1", "x2", "x4"))
    row = f"lane() < {matrices * 8} ? {scope.pointer(i.operands[0], 'shared', 16)} : nullptr"
    words = ", ".join(scope.read(w, "b32") for w in vector(i.operands[1]))
    return f"stmatrix({matrices}, {str('trans' in i.parts).lower()}, {row}, Words4{{{{{words}}}}});"


def _mma(scope: Scope, i: Instruction) -> str:
    formats = {("f32", "bf16", "bf16", "f32"): "bf16", ("f32", "f16", "f16", "f32"): "fp16"}
    element = formats.get(tuple(i.parts[-4:]))
    if "m16n8k16" not in i.parts or element is None:
        raise Unsupported(i.opcode)
    d, a, b, c = (vector(o) for o in i.operands)
    words_a, words_b = (", ".join(scope.read(x, "b32") for x in operand) for operand in (a, b))
    floats = ", ".join(scope.read(x, "f32") for x in c)
    moves = " ".join(scope.write(x, f"sums.value[{k}]", "f32") for k, x in enumerate(d))
    operands = f"MmaOperands{{{{{words_a}}}, {{{words_b}}}, {{{floats}}}}}"
    return f"const Floats4 sums = mma_m16n8k16_{element}({operands}); {moves}"


HANDLERS: dict[str, Handler] = {
    "bra": _branch,
    "ret": _return,
    "exit": _return,
    "trap": _trap,
    "bar": _barrier,
    "barrier": _barrier,
    "shfl": _shuffle,
    "vote": _vote,
    "redux": _reduce,
    "activemask": _active_mask,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "mma": _mma,
}
