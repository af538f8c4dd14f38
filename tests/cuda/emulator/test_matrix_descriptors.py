"""wgmma's operands in shared memory, in every swizzle, K-major and MN-major, against the layouts by definition."""

import pytest
import torch
from torch import Tensor

from tests.support import cuda_host
from tests.support.cuda_host import out
from tests.support.tolerances import assert_within, exactly, product

pytestmark = pytest.mark.skipif(cuda_host.missing_tools() is not None, reason=str(cuda_host.missing_tools()))

ROWS, COLUMNS, DEPTH, THREADS = 64, 128, 16, 128
A_BYTES, IMAGE_BYTES = 16 * 1024, 64 * 1024
"""Where b begins in the image of shared memory, and its size."""

KERNEL = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 storage[];
.visible .entry probe(.param .u64 image, .param .u64 y, .param .u64 a, .param .u64 b)
{{
.reg .pred %p<3>;
.reg .b32 %r<9>;
.reg .b64 %rd<9>;
.reg .f32 %f<{sums}>;
ld.param.u64 %rd1, [image];
ld.param.u64 %rd2, [y];
ld.param.u64 %rd3, [a];
ld.param.u64 %rd4, [b];
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 2;
again:
mov.u32 %r3, storage;
add.s32 %r3, %r3, %r2;
cvt.u64.u32 %rd5, %r2;
add.s64 %rd5, %rd1, %rd5;
ld.global.b32 %r4, [%rd5];
st.shared.b32 [%r3], %r4;
add.s32 %r2, %r2, 512;
setp.lt.u32 %p1, %r2, {bytes};
@%p1 bra again;
fence.proxy.async.shared::cta;
bar.sync 0;
wgmma.fence.sync.aligned;
setp.ne.s32 %p2, 0, 0;
wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{registers}}}, %rd3, %rd4, %p2, {signs}, {a_mn}, {b_mn};
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
mul.lo.s32 %r5, %r1, {thread_bytes};
cvt.u64.u32 %rd6, %r5;
add.s64 %rd6, %rd2, %rd6;
{stores}
ret;
}}
"""

Strides = tuple[int, int]
"""The descriptor's leading and stride offsets in bytes."""


def address(row: int, k: int, span: int, mn_major: bool, strides: Strides) -> int:
    """Return the address of an element of two bytes in a matrix, relative to its begin (PTX manual, wgmma)."""
    leading, stride = strides
    if not span:  # core matrices of eight lines of 16 bytes
        if mn_major:
            return row // 8 * stride + k // 8 * leading + k % 8 * 16 + row % 8 * 2
        return row // 8 * stride + k // 8 * leading + row % 8 * 16 + k % 8 * 2
    if mn_major:
        elements = span // 2
        line, byte = k % 8, row % elements * 2
        begin = row // elements * leading + k // 8 * stride
    else:
        line, byte = row % 8, k * 2
        begin = row // 8 * stride
    straight = begin + line * span + byte
    chunk, mask = straight // 16, {32: 1, 64: 3, 128: 7}[span]
    return (chunk ^ (straight // 128 & mask)) * 16 + straight % 16


def descriptor(begin: int, span: int, strides: Strides) -> int:
    """Return the 64 bits for a matrix that begins at a shared address."""
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[span]
    return begin >> 4 | strides[0] >> 4 << 16 | strides[1] >> 4 << 32 | mode << 62


def place(image: Tensor, matrix: Tensor, begin: int, span: int, mn_major: bool) -> int:
    """Store a matrix [rows, 16] in the image; return its descriptor."""
    pattern = span * 8 if span else 128
    strides = (pattern, pattern * (4 if not span else 2 if mn_major else 1))
    if span and mn_major:
        strides = (pattern * 2, pattern)
    words = image.view(torch.int16)
    for row in range(len(matrix)):
        for k in range(DEPTH):
            words[(begin + address(row, k, span, mn_major, strides)) // 2] = matrix.view(torch.int16)[row, k]
    return descriptor(begin, span, strides)


def multiply(a: Tensor, b: Tensor, span: int, a_mn: bool, b_mn: bool, signs: str = "1, 1") -> Tensor:
    """Return a b^T by one wgmma with both operands in shared memory."""
    image, n = torch.zeros(IMAGE_BYTES, dtype=torch.uint8), len(b)
    sums = n // 2
    text = KERNEL.format(
        n=n,
        sums=sums,
        bytes=IMAGE_BYTES,
        kind="bf16" if a.dtype == torch.bfloat16 else "f16",
        registers=", ".join(f"%f{i}" for i in range(sums)),
        signs=signs,
        a_mn=int(a_mn),
        b_mn=int(b_mn),
        thread_bytes=sums * 4,
        stores="\n".join(f"st.global.f32 [%rd6+{4 * i}], %f{i};" for i in range(sums)),
    )
    module = cuda_host.load_ptx(text)
    assert not module.unsupported
    a_bits, b_bits = place(image, a, 0, span, a_mn), place(image, b, A_BYTES, span, b_mn)
    y = torch.full((THREADS, sums), torch.nan)
    module.launch("probe", (1,), (THREADS,), IMAGE_BYTES, (image, out(y), a_bits, b_bits))
    thread, i = torch.arange(THREADS)[:, None], torch.arange(sums)[None]
    result = torch.full((ROWS, n), torch.nan)
    result[thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2] = y
    return result


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize(("a_mn", "b_mn"), [(False, False), (True, True)])
def test_operands_are_read_by_their_descriptors(span: int, a_mn: bool, b_mn: bool) -> None:
    a, b = torch.randn(ROWS, DEPTH).bfloat16(), torch.randn(COLUMNS, DEPTH).bfloat16()
    assert_within(multiply(a, b, span, a_mn, b_mn), product(exactly(a), exactly(b).T))


def test_operands_can_be_negated_and_have_any_multiple_of_eight_columns() -> None:
    a, b = torch.randn(ROWS, DEPTH).half(), torch.randn(24, DEPTH).half()
    assert_within(multiply(a, b, 128, False, False, signs="-1, 1"), product(exactly(-a), exactly(b).T))
    assert_within(multiply(a, b, 128, False, False, signs="-1, -1"), product(exactly(a), exactly(b).T))
