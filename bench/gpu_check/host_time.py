"""Host step: microseconds of Python and of launches in one layer call, without the time of the GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

import qlora_kernels as qk
from qlora_kernels.ops.operands import weight_of

from . import rows as rows_module
from .cases import TINY_SIZES, Sizes, factors, gaussian, weight_on
from .rows import Rows, step_arguments

CALLS, REPEATS = 50, 9
"""Number of calls between two waits for the GPU, below the size of its queue; number of measurements, of which the
minimum is used.
"""


def microseconds(
    call: Callable[[], object],
    calls: int = CALLS,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the host time of one call; the GPU is idle at the beginning of each measurement.

    Grad mode is off, as in a backward pass, and as in a forward pass that is not trained.
    """
    with torch.no_grad():
        for _ in range(3):
            call()
        least = float("inf")
        for _ in range(repeats):
            torch.cuda.synchronize()
            begin = clock()
            for _ in range(calls):
                call()
            least = min(least, (clock() - begin) / calls)
    torch.cuda.synchronize()
    return 1e6 * least


def layer_calls(sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], object]]:
    """Return the measured calls by name: a linear, a LoRA linear, and the latter's backward op without autograd."""
    device = rows_module.DEVICE
    packed, state = weight_on(device, sizes)
    weight = weight_of("gpu_check", packed, state)
    A, B = (factor.to(device) for factor in factors(dtype, sizes))
    x = gaussian(sizes.M, sizes.K, seed=3, dtype=dtype).to(device)
    s = gaussian(sizes.M, sizes.r, seed=7, dtype=dtype).to(device)
    grad_y = gaussian(sizes.M, sizes.N, seed=8, dtype=dtype).to(device)
    return {
        "linear": lambda: qk.linear_nf4(x, packed, state),
        "lora forward": lambda: qk.linear_nf4_lora(x, packed, state, A, B, scaling=2.0),
        "lora backward": lambda: torch.ops.qlora_kernels.linear_nf4_lora_backward.default(
            grad_y, x, s, *weight, A, B, None, 2.0, 0.0, True, True, True
        ),
    }


def shapes(tiny: bool) -> tuple[tuple[int, int], ...]:
    """Return the weight [N, K] of the calls, or that of a rehearsal."""
    return ((TINY_SIZES.N, TINY_SIZES.K),) if tiny else ((4096, 4096),)


def row_counts(tiny: bool) -> tuple[int, ...]:
    """Return the numbers of rows of x."""
    return (TINY_SIZES.M,) if tiny else (1, 64)


def measure(rows: Rows, backend: str, sizes: Sizes, calls: int = CALLS, repeats: int = REPEATS) -> None:
    """Write a row for each call."""
    with qk.use_backend(backend):
        for name, call in layer_calls(sizes).items():
            us = microseconds(call, calls, repeats)
            rows.add(backend=backend, call=name, M=sizes.M, N=sizes.N, K=sizes.K, us=us)


def main() -> int:
    """Run the step for one backend."""
    arguments = step_arguments(__doc__)
    rows = Rows(arguments.out, "host")
    tiny = arguments.tiny
    for N, K in shapes(tiny):
        for M in row_counts(tiny):
            measure(rows, arguments.backend, Sizes(M, N, K), *((1, 1) if tiny else (CALLS, REPEATS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
