"""The translator refuses instructions with modifiers that no handler implements."""

from __future__ import annotations

import pytest

from tests.support.cuda_host.ptx.parser import parse
from tests.support.cuda_host.ptx.translate import translate

KERNEL = """
.version 8.7
.target sm_80
.address_size 64
.visible .entry probe(.param .u64 p)
{{
.reg .pred %p<2>;
.reg .f32 %f<5>;
.reg .b16 %h<3>;
.reg .b32 %r<3>;
{instruction}
ret;
}}
"""


def unsupported(instruction: str) -> list[str]:
    return list(translate(KERNEL.format(instruction=instruction)).unsupported)


@pytest.mark.parametrize(
    "instruction",
    [
        "add.rm.f32 %f1, %f2, %f3;",
        "sub.rp.f32 %f1, %f2, %f3;",
        "mul.rz.f32 %f1, %f2, %f3;",
        "fma.rz.f32 %f1, %f2, %f3, %f4;",
        "div.rp.f32 %f1, %f2, %f3;",
        "sqrt.rm.f32 %f1, %f2;",
        "fma.rn.relu.bf16x2 %r1, %r1, %r2, %r2;",
        "mul.rn.ftz.f32 %f1, %f2, %f3;",
        "max.NaN.f32 %f1, %f2, %f3;",
        "cvt.rz.f32.s32 %f1, %r1;",
        "cvt.rz.bf16.f32 %h1, %f1;",
        "cvt.rn.relu.bf16x2.f32 %r1, %f1, %f2;",
    ],
)
def test_unsupported_modifier_is_refused(instruction):
    assert unsupported(instruction) == [instruction.split()[0]]


@pytest.mark.parametrize(
    "instruction",
    [
        "mov.pred %p1, -1;",
        "add.f32 %f1, %f2, %f3;",
        "mul.rn.f32 %f1, %f2, %f3;",
        "fma.rn.f32 %f1, %f2, %f3, %f4;",
        "fma.rn.ftz.f32 %f1, %f2, %f3, %f4;",
        "max.f32 %f1, %f2, %f3;",
        "cvt.rn.bf16.f32 %h1, %f1;",
        "cvt.rzi.s32.f32 %r1, %f1;",
    ],
)
def test_supported_instruction_is_translated(instruction):
    assert unsupported(instruction) == []


def test_words_that_a_kernel_loads_leave_out_padding():
    """Of {pointer, float, padding, two pointers}, of which two are loaded as a vector, and of a number alone."""
    text = KERNEL.replace("(.param .u64 p)", "(.param .align 8 .b8 args[32], .param .u32 n)").format(
        instruction="ld.param.u64 %rd1, [args]; ld.param.f32 %f1, [args+8];"
        "ld.param.v2.u64 {%rd2, %rd3}, [args+16]; ld.param.u32 %r1, [n];"
    )
    struct, number = parse(text).kernels[0].parameters
    assert struct.words == (0, 16, 24)
    assert number.words == ()
