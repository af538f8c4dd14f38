"""The memory limits of Linux control groups, by which containers and batch systems bound a process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_GROUPS = Path("/sys/fs/cgroup")


class MemoryLimit(NamedTuple):
    """A limit of a control group.

    limit: bytes that its processes may use, without swap.   used: bytes in use that the system cannot reclaim.
    """

    limit: int
    used: int


def memory_limits(root: Path = _GROUPS) -> list[MemoryLimit]:
    """Return the limits of the control groups of this process, of which an outer group binds as well as its own.

    The list is empty without a limit and on systems without control groups.
    Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    second = (root / _own_group(""), "memory.max", "memory.current", "inactive_file")
    first = (root / "memory" / _own_group("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
    return [
        limit
        for group, *names in (second, (*first, "total_inactive_file"))
        for folder in (group, *group.parents)
        if (limit := _limit(folder, *names)) is not None
    ]


def _limit(folder: Path, limit: str, usage: str, cache: str) -> MemoryLimit | None:
    try:
        most, used, counts = ((folder / name).read_text(encoding="utf-8") for name in (limit, usage, "memory.stat"))
    except OSError:  # the root, or the other version
        return None
    if most.strip() == "max":
        return None
    by_name = dict(line.split() for line in counts.splitlines())
    return MemoryLimit(int(most), int(used) - int(by_name.get(cache, 0)))


def _own_group(controller: str) -> str:
    """Return the path of this process's group below its controller's folder; "" in a container's own name space."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    paths = [path for _, names, path in (line.split(":", 2) for line in lines) if controller in names.split(",")]
    return paths[0].lstrip("/") if paths else ""
