"""Output of a running command: progress bars on a terminal, plain lines elsewhere, and neither with --json."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Console:
    """Prints the progress of a command to stderr, and measures its stages.

    quiet: print nothing.   stages: name of a stage -> its seconds.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.stages: dict[str, float] = {}
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds since the command began."""
        return time.perf_counter() - self._started

    def say(self, line: str) -> None:
        """Print one line of progress with the time."""
        if not self.quiet:
            sys.stderr.write(f"[{self.seconds:6.1f} s] {line}\n")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to stages[name]."""
        started = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - started

    def bar(self, total: int, name: str, unit: str) -> Any:
        """Return a tqdm bar, which is disabled outside terminals and notebooks."""
        from tqdm.auto import tqdm

        in_notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
        # None disables the bar if stderr is not a terminal, as in notebooks.
        shown = False if in_notebook else None
        return tqdm(total=total, desc=name, unit=unit, leave=False, disable=True if self.quiet else shown)


def rss_bytes() -> int:
    """Return the bytes of this process in RAM."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Return the peak of the bytes of this process in RAM."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux reports KiB


def memory_now(device: torch.device) -> str:
    """Return the memory in use: bytes of tensors on a CUDA device, otherwise the bytes of this process in RAM."""
    if device.type == "cuda":
        import torch

        return f"{device} {torch.cuda.memory_allocated(device) / 1e9:.2f} GB"
    return f"RSS {rss_bytes() / 1e9:.2f} GB"


def peak_device_bytes(device: torch.device) -> int:
    """Return the peak of the bytes of tensors on a CUDA device; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def megabytes(n: float) -> str:
    """Format a number of bytes in units of 10**6 bytes."""
    return f"{n / 1e6:,.1f} MB"
