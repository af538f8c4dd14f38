"""What a running command shows: bars on a terminal, plain lines anywhere, neither under --json."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Console:
    """Progress goes to stderr, results to stdout.   stages: seconds by name of what ran inside `stage`."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.stages: dict[str, float] = {}
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds since the command began."""
        return time.perf_counter() - self._started

    def say(self, line: str) -> None:
        """One line of progress, with the time."""
        if not self.quiet:
            sys.stderr.write(f"[{self.seconds:6.1f} s] {line}\n")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time inside to stages[name]."""
        started = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - started

    def bar(self, total: int, name: str, unit: str) -> Any:
        """A tqdm bar on a terminal or in a notebook; elsewhere it is disabled."""
        from tqdm.auto import tqdm

        in_notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
        # None disables it where stderr is no terminal, which is so in notebooks too.
        shown = False if in_notebook else None
        return tqdm(total=total, desc=name, unit=unit, leave=False, disable=True if self.quiet else shown)


def rss_bytes() -> int:
    """Memory that this process has in RAM now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """The most that it ever had."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def memory_now(device: torch.device) -> str:
    """The memory in use: what tensors take on a CUDA device, what this process takes of RAM otherwise."""
    if device.type == "cuda":
        import torch

        return f"{device} {torch.cuda.memory_allocated(device) / 1e9:.2f} GB"
    return f"RSS {rss_bytes() / 1e9:.2f} GB"


def peak_device_bytes(device: torch.device) -> int:
    """The most that tensors took on a CUDA device; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def megabytes(n: float) -> str:
    """In units of 10**6 bytes."""
    return f"{n / 1e6:,.1f} MB"
