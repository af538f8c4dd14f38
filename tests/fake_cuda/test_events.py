"""CUDA's rules of events: a wait is for the event's newest record at the time of the call, and for no later one."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.support.fake_cuda import FakeDevice

SCHEDULES = ["lazy", *(f"random:{seed}" for seed in range(5))]
"""Without the eager schedule, in which every record is done when its call returns."""


class Trace:
    """The order in which functions that were enqueued on streams have run."""

    def __init__(self, device: FakeDevice) -> None:
        self.names: list[str] = []
        self._device = device
        self._functions: list[object] = []  # they must live until they have run

    def enqueue(self, stream: torch.cuda.Stream, name: str) -> None:
        """Append `name` to the trace when the stream reaches this call."""
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: self.names.append(name))
        self._functions.append(function)
        self._device.launch_host_function(stream.cuda_stream, function)

    def record_after(self, event: torch.cuda.Event, stream: torch.cuda.Stream, name: str) -> None:
        """Enqueue `name`, and a record of the event that is done once `name` has run."""
        self.enqueue(stream, name)
        event.record(stream)

    def has_order(self, *names: str) -> bool:
        """Whether all of `names` have run, in this order."""
        return [name for name in self.names if name in names] == list(names)


@pytest.fixture
def trace(device: FakeDevice) -> Trace:
    torch.cuda.synchronize()
    return Trace(device)


@pytest.fixture
def event(device: FakeDevice) -> torch.cuda.Event:
    return torch.cuda.Event()


def streams(count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream() for _ in range(count)]


def test_a_wait_is_not_changed_by_a_later_record_on_another_stream(trace: Trace, event: torch.cuda.Event) -> None:
    first, second, waiting = streams(3)
    trace.record_after(event, first, "first")
    waiting.wait_event(event)
    trace.record_after(event, second, "second")
    trace.enqueue(waiting, "waiting")
    waiting.synchronize()
    assert trace.has_order("first", "waiting")
    second.synchronize()
    assert "second" in trace.names


def test_a_later_record_that_is_done_does_not_end_an_earlier_wait(trace: Trace, event: torch.cuda.Event) -> None:
    first, second, waiting = streams(3)
    trace.record_after(event, first, "first")
    waiting.wait_event(event)
    trace.enqueue(waiting, "waiting")
    event.record(second)
    second.synchronize()
    waiting.synchronize()
    assert trace.has_order("first", "waiting")


def test_an_event_is_recorded_again_on_the_stream_that_waited_for_it(trace: Trace, event: torch.cuda.Event) -> None:
    first, second, third = streams(3)
    trace.record_after(event, first, "first")
    second.wait_event(event)
    trace.record_after(event, second, "second")
    third.wait_event(event)
    event.record(third)
    trace.enqueue(third, "third")
    third.synchronize()
    assert trace.has_order("first", "second", "third")


def test_the_host_asks_and_waits_for_the_newest_record(
    trace: Trace, event: torch.cuda.Event, device: FakeDevice
) -> None:
    device.set_schedule("lazy")  # a query runs at most one step, which is the function
    first, second = streams(2)
    event.record(first)
    first.synchronize()
    assert event.query()
    trace.record_after(event, second, "second")
    assert not event.query()
    event.synchronize()
    assert trace.has_order("second")


def test_an_event_of_a_finished_capture_is_refused_until_it_is_recorded_again(event: torch.cuda.Event) -> None:
    (stream,) = streams(1)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        event.record(stream)
    with pytest.raises(RuntimeError, match="event last recorded in a capturing stream"):
        event.synchronize()
    event.record(stream)
    event.synchronize()
