"""The memory that tests may use: that of the machine, within the limits of a container."""

from __future__ import annotations

from pathlib import Path

from qlora_kernels.cli.container_memory import memory_limits


def free_bytes() -> int | None:
    """Return the bytes that this process can allocate without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return min([available, *(max(0, group.limit - group.used) for group in memory_limits())])
