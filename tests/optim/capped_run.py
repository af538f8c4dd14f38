"""A training run under a memory cap: python -m tests.optim.capped_run PAGE_DIR|none CAP_BYTES

It trains one parameter for three steps and prints the SHA-256 of the result. CAP_BYTES limits the allocations of the
process beyond its present memory (RLIMIT_DATA: anonymous memory; mapped files are page cache, which the system reclaims
under pressure). The exit code is 3 if an allocation fails.
"""

from __future__ import annotations

import hashlib
import resource
import sys

import torch
from torch import nn

from qlora_kernels.optim import PagedAdamW, state_placement

NUMEL = 8 << 20
STATE_BYTES = 8 * NUMEL
CHUNK_BYTES = 4 << 20


def train(page_dir: str | None, cap_bytes: int | None) -> str:
    """Return `<digest of weight and states> <chunks> <bytes prefetched>`."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(NUMEL))
    weight.grad = torch.randn(NUMEL)
    # Loads libraries and starts all threads, whose stacks count, before the limit is set.
    warm = nn.Parameter(torch.zeros(1 << 20))
    warm.grad = torch.zeros(1 << 20)
    PagedAdamW([warm], page_dir=page_dir).step()
    if cap_bytes is not None:
        with open("/proc/self/status", encoding="utf-8") as status:
            [held] = [int(line.split()[1]) << 10 for line in status if line.startswith("VmData:")]
        resource.setrlimit(resource.RLIMIT_DATA, (held + cap_bytes,) * 2)
    optimizer = PagedAdamW([weight], page_dir=page_dir)
    for _ in range(3):
        optimizer.step()
        weight.grad.mul_(-0.5)
    states = optimizer.state[weight]
    digest = hashlib.sha256()
    for tensor in (weight.detach(), states["exp_avg"], states["exp_avg_sq"]):
        digest.update(tensor.numpy().data)
    report = optimizer.paging_report()
    return f"{digest.hexdigest()} {report.chunks} {report.prefetched_bytes}"


def main() -> None:
    state_placement.CHUNK_BYTES = CHUNK_BYTES
    try:
        result = train(None if sys.argv[1] == "none" else sys.argv[1], int(sys.argv[2]))
    except (RuntimeError, MemoryError) as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(3) from error
    sys.stdout.write(result)


if __name__ == "__main__":
    main()
