"""Paging step: PagedAdamW's results against the CPU bit for bit, and its rate with and without memory pressure."""

from __future__ import annotations

import sys
import time

import torch

import qlora_kernels as qk

from . import rows as rows_module
from .cases import gaussian
from .rows import Rows, step_arguments

STATE_BYTES = 6 << 30
SPARE_BYTES = 2 << 30
"""Bytes of GPU memory that the ballast leaves free."""

STEPS = 5


def parameters(device: str, numel: int) -> list[torch.nn.Parameter]:
    """Return two parameters with gradients from seeds."""
    found = [torch.nn.Parameter(gaussian(n, seed=n % 97).to(device)) for n in (numel, 4096 + 77)]
    for parameter in found:
        parameter.grad = gaussian(parameter.numel(), seed=1).to(device)
    return found


def check_bits(rows: Rows) -> bool:
    """Compare three steps on both devices bit for bit."""
    results = []
    for device in (rows_module.DEVICE, "cpu"):
        own = parameters(device, 100_000)
        with qk.PagedAdamW(own, lr=1e-2) as optimizer:
            for _ in range(3):
                optimizer.step()
        results.append([p.detach().cpu() for p in own])
    ok = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    rows.add(check="bits against the CPU", ok=ok)
    return ok


def measure(rows: Rows, numel: int, pressure: bool) -> None:
    """Return the seconds of a step; with pressure, a ballast leaves less free memory than the states need."""
    parameter = torch.nn.Parameter(torch.zeros(numel, device=rows_module.DEVICE, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    with qk.PagedAdamW([parameter], lr=1e-3) as optimizer:
        optimizer.step()
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        ballast = None
        if pressure and free > SPARE_BYTES:
            ballast = torch.empty(free - SPARE_BYTES, dtype=torch.uint8, device=rows_module.DEVICE)
        times = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            optimizer.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        del ballast
    seconds = sorted(times)[STEPS // 2]
    rows.add(pressure=pressure, numel=numel, ms=seconds * 1e3, gb_per_s=2 * 8 * numel / seconds / 1e9)


def main() -> int:
    """Run the step; 1 if a result is wrong."""
    arguments = step_arguments(__doc__)
    rows = Rows(arguments.out, "paging")
    ok = check_bits(rows)
    for pressure in (False,) if arguments.tiny else (False, True):
        measure(rows, 10_000 if arguments.tiny else STATE_BYTES // 8, pressure)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
