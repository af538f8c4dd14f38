"""Instructions of sm_90a: mbarriers, TMA copies, products of warpgroups."""

from __future__ import annotations

import re

from .arithmetic import Handler
from .parser import Instruction, c_name, vector
from .scope import Scope, Unsupported

_ELEMENTS = {("f32", "bf16", "bf16"): "Element16::kBf16", ("f32", "f16", "f16"): "Element16::kFp16"}
_HERE = "Where::current()"


def _window(scope: Scope, operand: str) -> str:
    """Return the host address of a shared address, without checks: the emulator's functions make their own."""
    return f"shared_window({scope.address(operand)})"


def _mbarrier(scope: Scope, i: Instruction) -> str:
    operation, operands = i.parts[1], list(i.operands)
    if {"noComplete", "shared::cluster"}.intersection(i.parts):
        raise Unsupported(i.opcode)
    if operation == "init":
        return f"mbarriers().init({_window(scope, operands[0])}, {scope.read(operands[1], 'u32')}, {_HERE});"
    if operation == "inval":
        return f"mbarriers().invalidate({_window(scope, operands[0])}, {_HERE});"
    if operation == "expect_tx":
        return f"mbarriers().expect({_window(scope, operands[0])}, {scope.read(operands[1], 'u32')}, {_HERE});"
    if operation == "arrive":
        return _arrive(scope, i)
    if operation in ("test_wait", "try_wait"):
        # Without .parity the operand is the state that an arrival returned: the number of its phase.
        parity = scope.read(operands[2], "u32" if "parity" in i.parts else "u64")
        parity = parity if "parity" in i.parts else f"uint32_t({parity} & 1)"
        call = f"mbarriers().{operation}({_window(scope, operands[1])}, {parity}, {_HERE})"
        return scope.write(operands[0], call, "pred")
    raise Unsupported(i.opcode)


def _arrive(scope: Scope, i: Instruction) -> str:
    state, address, *more = i.operands
    expect, count = "", "1"
    if "expect_tx" in i.parts:
        expect = f"mbarriers().expect(barrier, {scope.read(more[0], 'u32')}, {_HERE}); "
    elif more:
        count = scope.read(more[0], "u32")
    arrival = f"mbarriers().arrive(barrier, {count}, {_HERE})"
    return f"void* barrier = {_window(scope, address)}; {expect}" + scope.write(state, arrival, "b64")


def _fence(scope: Scope, i: Instruction) -> str:
    """Fences do nothing for ordinary accesses: blocks run one after another, memory is sequentially consistent."""
    if i.opcode.startswith("fence.proxy.async"):
        return "mbarriers().fence_init(); async_proxy().fence();"
    return "mbarriers().fence_init();" if "mbarrier_init" in i.parts else ";"


def copies_tensor(i: Instruction) -> bool:
    """Whether the instruction is a TMA copy from global to shared memory that the emulator knows."""
    return (
        i.opcode.startswith("cp.async.bulk.tensor.")
        and i.parts[5].startswith("shared::")
        and i.parts[6] == "global"
        and "mbarrier::complete_tx::bytes" in i.opcode
        and not {"multicast::cluster", "im2col", "cta_group::2"}.intersection(i.parts)
    )


def tensor_copy(scope: Scope, i: Instruction) -> str:
    """Translate a TMA copy."""
    source = re.fullmatch(r"\[\s*([^,\s]+)\s*,\s*(\{.*\})\s*\]", i.operands[1])
    if source is None:
        raise Unsupported(i.opcode)
    coordinates = ", ".join(scope.read(c, "s32") for c in vector(source[2]))
    tensor_map = f"reinterpret_cast<const void*>({scope.address(f'[{source[1]}]')})"
    return (
        f"tensor_copies().issue({_window(scope, i.operands[0])}, {tensor_map}, {{{coordinates}}}, "
        f"{_window(scope, i.operands[2])}, {_HERE});"
    )


def _wgmma(scope: Scope, i: Instruction) -> str:
    operation = i.parts[1]
    if operation == "fence":
        return f"{scope.warpgroup.clean()} warpgroups().fence();"
    if operation == "commit_group":
        return "warpgroups().commit();"
    if operation == "wait_group":
        moved = scope.warpgroup.moved
        if not moved:
            return f"warpgroups().wait({i.operands[0]}, {_HERE});"
        registers = ", ".join(f"&{c_name(name)}" for name in moved)
        return (
            f"uint32_t* const registers[] = {{{registers}}}; "
            f"warpgroups().wait_moved({i.operands[0]}, registers, {len(moved)}, {_HERE});"
        )
    if operation != "mma_async":
        raise Unsupported(i.opcode)
    return _product(scope, i)


def _product(scope: Scope, i: Instruction) -> str:
    shape = re.fullmatch(r"m64n(\d+)k16", i.parts[4])
    element = _ELEMENTS.get(tuple(i.parts[5:]))
    sums, a, b, accumulate, *scales = i.operands
    in_shared = not a.startswith("{")
    negate_a, negate_b, *transposed = scales
    if shape is None or element is None:
        raise Unsupported(i.opcode)
    fields = {
        "n": shape[1],
        "element": element,
        "accumulate": scope.read(accumulate, "pred"),
        "negate_a": str(negate_a == "-1").lower(),
        "negate_b": str(negate_b == "-1").lower(),
        "a_in_shared": str(in_shared).lower(),
        "a_mn_major": str(in_shared and transposed[0] == "1").lower(),
        "b_mn_major": str(transposed[-1] == "1").lower(),
        "a": scope.read(a, "b64") if in_shared else "0",
        "b": scope.read(b, "b64"),
    }
    words = [] if in_shared else [scope.register(word) for word in vector(a)]
    if in_shared:
        operand, function = "const uint32_t* a = nullptr;", "issue"
    elif scope.watches_operands:
        operand, function = f"uint32_t* const a[4] = {{{', '.join('&' + word for word in words)}}};", "issue_registers"
    else:
        operand, function = f"const uint32_t a[4] = {{{', '.join(words)}}};", "issue"
    return (
        f"{scope.warpgroup.check([*vector(sums), *([] if in_shared else vector(a))])} "
        f"const WgmmaShape shape{{{', '.join(f'.{name} = {value}' for name, value in fields.items())}}}; {operand} "
        f"uint32_t* const sums[] = {{{', '.join('&' + scope.register(s) for s in vector(sums))}}}; "
        f"warpgroups().{function}(shape, a, sums, {_HERE});"
    )


def _elect(scope: Scope, i: Instruction) -> str:
    leader, _, predicate = i.operands[0].partition("|")
    mask = scope.read(i.operands[1], "u32")
    chosen = (
        f'const int chosen = reduce_warp<int>("elect.sync", {mask}, lane(), [](int a, int) {{ return a; }}, {_HERE});'
    )
    return f"{chosen} {scope.write(leader, 'uint32_t(chosen)', 'b32')} {scope.register(predicate)} = lane() == chosen;"


def _nothing(scope: Scope, i: Instruction) -> str:
    return ";"


HANDLERS: dict[str, Handler] = {
    "mbarrier": _mbarrier,
    "fence": _fence,
    "wgmma": _wgmma,
    "elect": _elect,
    "setmaxnreg": _nothing,  # the number of registers changes no value
}
