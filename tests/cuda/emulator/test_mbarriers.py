"""mbarriers in the emulator: misuse that it reports, the order of memory that they give, and PTX that no header has."""

from pathlib import Path

import pytest
import torch

from tests.support import cuda_host
from tests.support.cuda_host import out

from .test_hopper import both_paths
from .test_planted_faults import RACE

pytestmark = pytest.mark.skipif(cuda_host.missing_tools() is not None, reason=str(cuda_host.missing_tools()))

SOURCE = Path(__file__).with_name("hopper_misuse.cu")


@both_paths
@pytest.mark.parametrize(
    ("which", "report"),
    [
        (0, "is not 8-byte aligned"),
        (1, "is not in the block's shared memory"),
        (2, "the mbarrier is not initialized"),
        (3, "too many arrive"),
        (4, "is initialized already"),
        (5, "the mbarrier's memory was overwritten"),
        (6, "lacks 1 of 2 arrivals and 0 bytes"),
        (7, "deadlock: .* and 29 more in wgmma.wait_group"),
        (8, "more than 2\\^20 - 1 bytes are expected"),
        (9, "the arrivals must be 1 to"),
    ],
)
def test_misuse_is_reported(mode: str, which: int, report: str) -> None:
    library = cuda_host.build([SOURCE], mode)
    with pytest.raises(cuda_host.KernelFault, match=report):
        library.call("launch_misuse", which, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_wait_comes_after_what_was_before_the_arrivals(order: str) -> None:
    y = torch.zeros(1, dtype=torch.int32)
    cuda_host.build([SOURCE], "tsan").call("launch_order", 0, out(y), order=order)
    assert y.item() == 2


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("which", [1, 2])
def test_wait_comes_after_nothing_else(which: int, order: str) -> None:
    """Neither after what follows an arrival, nor after the arrivals of a later phase, in whatever order they ran."""
    y = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(cuda_host.SanitizerReport, match=RACE):
        cuda_host.build([SOURCE], "tsan").call("launch_order", which, out(y), order=order)


KERNEL = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry probe(.param .u64 y)
{
.reg .pred %p<5>;
.reg .b32 %r<9>;
.reg .b64 %rd<9>;
.shared .align 8 .b64 barrier[2];
setmaxnreg.dec.sync.aligned.u32 40;
ld.param.u64 %rd1, [y];
mov.u32 %r1, %tid.x;
mov.u32 %r2, barrier;
setp.eq.s32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 32;
bar.sync 0;
elect.sync %r4|%p2, 0xffffffff;
@%p2 mbarrier.arrive.release.cta.shared::cta.b64 %rd2, [%r2], 31;
@%p2 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 0;
setp.eq.s32 %p3, %r1, 31;
@%p3 mbarrier.arrive.shared::cta.b64 %rd2, [%r2];
mov.u64 %rd2, 0;
again:
mbarrier.test_wait.shared::cta.b64 %p4, [%r2], %rd2;
@!%p4 bra again;
bar.sync 0;
@%p1 mbarrier.inval.shared::cta.b64 [%r2];
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
bar.sync 0;
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];
last:
mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p4, [%r2], 0, 100;
@!%p4 bra last;
mul.lo.s32 %r5, %r1, 4;
cvt.u64.u32 %rd3, %r5;
add.s64 %rd3, %rd1, %rd3;
selp.u32 %r6, 1, 0, %p2;
add.s32 %r6, %r6, %r4;
st.global.b32 [%rd3], %r6;
ret;
}
"""


@pytest.mark.parametrize("seed", range(3))
def test_instructions_of_ptx(seed: int) -> None:
    """Arrivals with a count, their state, tests, waits that may give up, invalidation, and the elected lane."""
    module = cuda_host.load_ptx(KERNEL)
    assert not module.unsupported
    y = torch.full((32,), -1, dtype=torch.int32)
    module.launch("probe", (1,), (32,), 0, (out(y),), seed=seed)
    assert y.tolist() == [1, *[0] * 31]
