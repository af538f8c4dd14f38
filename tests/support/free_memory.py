"""The memory that tests may use: that of the machine, within the limits of a container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Return the bytes that this process can allocate without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return min([available, *_left_in_groups(_GROUPS)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what the memory limits of this process's control groups leave (man cgroups; versions 2 and 1)."""
    for group, limit, usage, cache in (
        (root / _own_group(""), "memory.max", "memory.current", "inactive_file"),
        (
            root / "memory" / _own_group("memory"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        for folder in (group, *group.parents):
            try:
                most, used = ((folder / name).read_text(encoding="utf-8").strip() for name in (limit, usage))
                counts = dict(
                    line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
                )
            except OSError:  # the root, or the other version
                continue
            if most != "max":
                yield max(0, int(most) - int(used) + int(counts.get(cache, 0)))  # the system reclaims the cache


def _own_group(controller: str) -> str:
    """Return the path of this process's group below its controller's folder; "" in a container's own name space."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    paths = [path for _, names, path in (line.split(":", 2) for line in lines) if controller in names.split(",")]
    return paths[0].lstrip("/") if paths else ""
