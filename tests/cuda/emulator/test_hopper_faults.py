"""The emulator detects the planted faults of hopper_product.cuh in every mode that can detect them."""

from pathlib import Path

import pytest
import torch

from tests.support import cuda_host
from tests.support.cuda_host import out
from tests.support.tolerances import exactly, product

from .test_planted_faults import RACE, RIGHT, WRONG_RESULT, needs_nvcc

pytestmark = pytest.mark.skipif(cuda_host.missing_tools() is not None, reason=str(cuda_host.missing_tools()))

SOURCE = Path(__file__).with_name("hopper_faults.cu")
SEEDS = range(1, 7)
NO_FULL_WAIT, WRONG_PARITY, TOO_MANY_BYTES, TOO_FEW_BYTES, NO_EMPTY_WAIT, EARLY_ARRIVAL, TOO_MANY_ARRIVALS = range(1, 8)
NO_INIT_FENCE, NO_INIT_BARRIER, NO_REGISTER_FENCE, NO_COMMIT, NO_LAST_WAIT, SUMS_WRITTEN = range(8, 14)
ONE_SET_OF_REGISTERS, NO_SWIZZLE, MISPLACED_TILE, BOX_WIDTH = range(14, 18)

DETECTED = ""
"""Any report: which one depends on the schedule."""

IN_EVERY_MODE = {
    TOO_MANY_BYTES: "lacks 0 of 1 arrivals and 64 bytes",
    TOO_FEW_BYTES: "lacks 0 of 1 arrivals and -64 bytes",
    NO_INIT_FENCE: "fence.mbarrier_init is missing",
    NO_REGISTER_FENCE: "wgmma.fence is missing",
    NO_LAST_WAIT: WRONG_RESULT,
    NO_SWIZZLE: WRONG_RESULT,
    MISPLACED_TILE: "must begin at a multiple of 1024 bytes",
    BOX_WIDTH: "the inner size of the box must be a multiple of 16 bytes",
}
FROM_SOURCE = IN_EVERY_MODE | {NO_COMMIT: WRONG_RESULT, SUMS_WRITTEN: "sum 5 was written before the wait_group"}
FROM_PTX = IN_EVERY_MODE | {
    # nvcc moves the scaling of the sum to where the next product is issued.
    SUMS_WRITTEN: "wgmma.fence is missing between a write of its registers and it",
    NO_COMMIT: "register 0 of a was written before the wait_group",
    ONE_SET_OF_REGISTERS: "register 0 of a was written before the wait_group",
}
BY_SCHEDULE = dict.fromkeys(
    (NO_FULL_WAIT, WRONG_PARITY, NO_EMPTY_WAIT, EARLY_ARRIVAL, TOO_MANY_ARRIVALS, NO_INIT_BARRIER), DETECTED
)
RACES = {NO_FULL_WAIT: RACE, WRONG_PARITY: RACE, NO_EMPTY_WAIT: RACE, EARLY_ARRIVAL: RACE, TOO_MANY_ARRIVALS: RACE}
CAUGHT = {
    "plain": FROM_SOURCE | BY_SCHEDULE,
    "tsan": FROM_SOURCE | RACES,
    "ptx": FROM_PTX | BY_SCHEDULE,
    "ptx-tsan": {**RACES, ONE_SET_OF_REGISTERS: FROM_PTX[ONE_SET_OF_REGISTERS]},
}
"""What each mode reports for a fault; faults that are not listed cannot be detected in that mode, or are not tried."""

CASES = [
    pytest.param(mode, fault, report, id=f"{mode}-{fault}", marks=needs_nvcc if "ptx" in mode else ())
    for mode, faults in CAUGHT.items()
    for fault, report in {RIGHT: "", **faults}.items()
]


def run(mode: str, fault: int, seed: int) -> str:
    """Run the product with a fault; return the emulator's report, WRONG_RESULT, or an empty string."""
    torch.manual_seed(seed)
    a, b, y = torch.randn(128, 640).bfloat16(), torch.randn(64, 640).bfloat16(), torch.full((128, 64), torch.nan)
    try:
        cuda_host.build([SOURCE], mode).call("launch_product", fault, a, b, out(y), 640, seed=seed)
    except (cuda_host.KernelFault, cuda_host.SanitizerReport) as report:
        return str(report)
    expected = product(exactly(a), exactly(b).T)
    return "" if ((y - expected.value).abs() <= expected.error).all() else WRONG_RESULT


@pytest.mark.parametrize(("mode", "fault", "report"), CASES)
def test_fault_is_reported(mode: str, fault: int, report: str) -> None:
    seeds = SEEDS if fault in BY_SCHEDULE else SEEDS[:2]
    reports = [run(mode, fault, seed) for seed in seeds]
    if fault == RIGHT:
        assert reports == [""] * len(seeds)
        return
    # A stage that is given back too early shows only where one warpgroup is late.
    by_chance = fault in (NO_EMPTY_WAIT, EARLY_ARRIVAL, TOO_MANY_ARRIVALS)
    assert sum(report in text for text in reports if text) >= (2 if by_chance else len(seeds)), reports
