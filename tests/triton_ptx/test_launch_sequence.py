"""A sequence passes to the kernels what its launches pass one by one; a recording driver stands for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from qlora_kernels.backends.triton.launch import Launchable
from qlora_kernels.backends.triton.launch_sequence import LaunchSequence
from tests.support.problems import gaussian

from .recording import RecordingDriver, addresses, by_triton, calls, recorded_kernel

SHAPE = (40, 16)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launchable]:
    """A kernel without kept launches, on the recording driver."""
    yield recorded_kernel(monkeypatch)
    calls.clear()


def doubled_twice(launched: Launchable, *, temporary: bool = False) -> LaunchSequence:
    """Return launches that add three partial sums, then round their sum to bf16. temporary: return the latter alone."""
    launches = [launched.prepare((1,), (640, parts, 0.5), BLOCK=1024, num_warps=4) for parts in (3, 1)]
    sequence = LaunchSequence(inputs=1)
    first = sequence.allocate(SHAPE, torch.float32)
    second = sequence.allocate(SHAPE, torch.bfloat16)
    sequence.add(launches[0], 0, first)
    sequence.add(launches[1], first, second)
    sequence.returns(*((second,) if temporary else (first, second)))
    return sequence


def test_kept_launches_pass_what_triton_passes(kernel: Launchable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = by_triton(monkeypatch)
    sequence = doubled_twice(kernel)
    inputs = [gaussian(3, *SHAPE) for _ in range(2)]
    results = [sequence(parts) for parts in inputs]
    assert len(seen) == 2  # both of the first call
    for parts, (first, second), one, other in zip(inputs, results, calls[::2], calls[1::2], strict=True):
        assert addresses(one[9:]) == [parts.data_ptr(), first.data_ptr(), 640, 3, 0.5, 1024]
        assert addresses(other[9:]) == [first.data_ptr(), second.data_ptr(), 640, 1, 0.5, 1024]
        assert (first.shape, first.stride(), first.dtype) == (SHAPE, (16, 1), torch.float32)
        assert (second.shape, second.stride(), second.dtype) == (SHAPE, (16, 1), torch.bfloat16)
    assert calls[0][:6] == calls[2][:6]  # grid, stream, function, metadata
    assert calls[1][:6] == calls[3][:6]


def test_temporary_memory_of_a_call_is_one_aligned_allocation(kernel: Launchable) -> None:
    launch = kernel.prepare((1,), (640, 3, 0.5), BLOCK=1024, num_warps=4)
    sequence = LaunchSequence(inputs=1)
    slots = [sequence.allocate((40, width), torch.float32) for width in (5, 16, 3)]  # 800, 2560 and 480 bytes
    for source, target in zip((0, *slots), slots, strict=False):
        sequence.add(launch, source, target)
    sequence.returns(slots[1])
    assert sequence.temporary_bytes == 1024 + 512
    for parts in [gaussian(3, *SHAPE)] * 2:
        (result,) = sequence(parts)
    assert (result.shape, result.dtype) == (SHAPE, torch.float32)
    to_first, to_result, to_last = (addresses(call[9:])[:2] for call in calls[3:])
    assert to_first[0] == parts.data_ptr()
    assert to_first[1] == to_result[0]
    assert to_result[1] == to_last[0] == result.data_ptr()
    assert to_last[1] == to_first[1] + 1024


def test_first_call_uses_temporaries_of_their_own_dtype(kernel: Launchable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton specializes on the dtypes of tensors, and the later calls pass addresses alone."""
    seen = by_triton(monkeypatch)
    sequence = doubled_twice(kernel, temporary=True)
    for _ in range(2):
        (result,) = sequence(gaussian(3, *SHAPE))
    assert len(seen) == 2
    assert (result.shape, result.dtype) == (SHAPE, torch.bfloat16)
    assert calls[0][5] == calls[2][5]
    assert calls[1][5] == calls[3][5]
    assert addresses(calls[2][9:])[1] == addresses(calls[3][9:])[0]
    assert addresses(calls[3][9:])[1] == result.data_ptr()


@pytest.mark.parametrize(
    "other",
    [gaussian(3 * 640 + 1)[1:].view(3, *SHAPE), gaussian(3, *SHAPE).to(torch.bfloat16)],
    ids=["alignment", "dtype"],
)
def test_inputs_of_another_kind_take_another_kernel(
    kernel: Launchable,
    monkeypatch: pytest.MonkeyPatch,
    other: Tensor,
) -> None:
    seen = by_triton(monkeypatch)
    sequence, usual = doubled_twice(kernel), gaussian(3, *SHAPE)
    for parts in (usual, other, usual, other):
        sequence(parts)
    assert len(seen) == 3  # the second launch is of the same kind for both
    functions = [call[4] for call in calls[::2]]
    assert len(functions) == 4
    assert [call[5] for call in calls[:2]] == [call[5] for call in calls[4:6]]
    assert [call[5] for call in calls[2:4]] == [call[5] for call in calls[6:8]]
    assert calls[0][5] != calls[2][5]


def test_launches_are_on_the_stream_of_the_call(kernel: Launchable, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = doubled_twice(kernel)
    for stream in (0, 0, 7):
        monkeypatch.setattr(RecordingDriver, "get_current_stream", lambda self, device, stream=stream: stream)
        sequence(gaussian(3, *SHAPE))
    assert [call[3] for call in calls] == [0, 0, 0, 0, 7, 7]


def by_hook_of_triton(kernel: Launchable, observer: Callable[..., None]) -> None:
    triton.knobs.runtime.launch_enter_hook.add(observer)


def by_hook_of_the_kernel(kernel: Launchable, observer: Callable[..., None]) -> None:
    kernel.kernel.add_pre_run_hook(observer)


@pytest.mark.parametrize("observe", [by_hook_of_triton, by_hook_of_the_kernel])
def test_every_launch_is_observed(
    kernel: Launchable,
    monkeypatch: pytest.MonkeyPatch,
    observe: Callable[..., Any],
) -> None:
    sequence, seen = doubled_twice(kernel), by_triton(monkeypatch)
    observer = lambda *_, **__: None  # noqa: E731 - removed again by identity
    for observed in (False, False, True):
        if observed:
            observe(kernel, observer)
        sequence(gaussian(3, *SHAPE))
    triton.knobs.runtime.launch_enter_hook.remove(observer)
    assert len(seen) == 4  # the first call, and the observed one
