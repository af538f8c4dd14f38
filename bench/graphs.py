"""Kernel time on a GPU: a CUDA graph of many calls, replayed after the L2 cache was overwritten.

A call that takes 5 us on the GPU takes 20 to 50 us of Python, so that the GPU is mostly idle between two events around
the call. A graph runs without Python. Calls that read different operands in turn read them from memory if all operands
together exceed L2.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from qlora_kernels.rounding import cdiv

Call = Callable[[], object]

FLUSH_BYTES = 256 * 2**20
"""Bytes that exceed the L2 cache of every present GPU."""

FEWEST_CALLS = 10
"""Number of calls in a graph, so that the launch of the graph takes a small part of the time."""


class Graphed:
    """Calls captured as one CUDA graph; a call replays all of them. `count`: the number of calls."""

    def __init__(self, calls: Sequence[Call], warm_ups: int = 2) -> None:
        repeats = cdiv(FEWEST_CALLS, len(calls))
        self.count = repeats * len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = [call() for _ in range(repeats) for call in calls]

    def __call__(self) -> None:
        self._graph.replay()


def seconds(call: Call, flush: torch.Tensor | None = None) -> float:
    """Return the GPU seconds of one call, or of each call of a Graphed, after `flush`, if given, was overwritten."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flush is not None:
        flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    elapsed: float = start.elapsed_time(end) / 1e3 / getattr(call, "count", 1)
    return elapsed


def median_seconds(calls: Sequence[Call], samples: int = 15, flush: torch.Tensor | None = None) -> float:
    """Return the median over replays of the seconds of one of `calls`."""
    graphed = Graphed(calls)
    return statistics.median(seconds(graphed, flush) for _ in range(samples))


def flush_buffer(bytes_: int = FLUSH_BYTES) -> torch.Tensor:
    """Return memory for `seconds` to overwrite."""
    return torch.empty(bytes_, dtype=torch.uint8, device="cuda")


def copies_beyond_l2(bytes_: int, most: int = 32) -> int:
    """Return the number of operands of `bytes_` that together exceed twice the L2 cache."""
    l2: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(most, cdiv(2 * l2, max(1, bytes_))))
