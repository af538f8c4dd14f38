"""The plan of slots, chunks and prefetches, by properties over random sizes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_kernels.optim.paging_plan import (
    ALIGNMENT,
    CUT,
    SMALLEST_8BIT,
    Action,
    plan_chunks,
    plan_schedule,
    plan_slots,
    plan_staging,
)

sizes = st.lists(
    st.one_of(st.integers(0, 700), st.integers(SMALLEST_8BIT - 1, SMALLEST_8BIT + 1), st.integers(5000, 60_000)),
    min_size=1,
    max_size=8,
)


SAME_EVERY_TIME = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
"""No test depends on chance or on the load of the machine."""


def spans_of(segment):
    """Return (start, stop) in the arena of each state of a segment, from the kernel's row alone."""
    if segment.exp_avg_absmax < 0:
        lengths = [(segment.exp_avg, 4 * segment.numel), (segment.exp_avg_sq, 4 * segment.numel)]
    else:
        absmax = 4 * -(-segment.numel // 256)
        lengths = [(segment.exp_avg, segment.numel), (segment.exp_avg_sq, segment.numel)]
        lengths += [(segment.exp_avg_absmax, absmax), (segment.exp_avg_sq_absmax, absmax)]
    return [(offset, offset + length) for offset, length in lengths]


@SAME_EVERY_TIME
@given(sizes, st.sampled_from([8, 32]), st.sampled_from([1, 10_000, 100_000, None]), st.integers(1, 4))
def test_chunks_cover_every_element_once_and_never_share_a_byte(numels, bits, chunk_bytes, group_size):
    slots, nbytes = plan_slots(numels, bits)
    groups = [index // group_size for index in range(len(numels))]
    chunks = plan_chunks(slots, groups, chunk_bytes)
    covered = dict.fromkeys(range(len(numels)), 0)
    taken = []
    for chunk in chunks:
        assert {groups[chunk.first_param + segment.param] for segment in chunk.segments} == {chunk.group}
        assert chunk.last_param == chunk.first_param + chunk.segments[-1].param
        for segment in chunk.segments:
            param = chunk.first_param + segment.param
            assert segment.start == covered[param]
            assert segment.start % CUT == 0
            assert segment.counter == slots[param].counter + segment.start
            covered[param] += segment.numel
            for start, stop in spans_of(segment):
                assert start % ALIGNMENT == 0
                assert any(first <= start and stop <= last for first, last in chunk.ranges)
        taken += chunk.ranges
    assert covered == dict(enumerate(numels))
    taken.sort()
    assert all(stop <= start for (_, stop), (start, _) in pairwise(taken))
    assert not taken or taken[-1][1] <= nbytes
    if chunk_bytes is None:
        assert len(chunks) == len({groups[param] for param, numel in enumerate(numels) if numel})


@SAME_EVERY_TIME
@given(sizes, st.sampled_from([8, 32]))
def test_chunk_sizes_are_bounded(numels, bits):
    chunk_bytes = 150_000
    slots, _ = plan_slots(numels, bits)
    chunks = plan_chunks(slots, [0] * len(numels), chunk_bytes)
    padding = 4 * ALIGNMENT * max(len(numels), 1)
    assert all(chunk.nbytes <= chunk_bytes + padding for chunk in chunks)
    one_cut = 8 * CUT
    assert all(chunk.nbytes > chunk_bytes - one_cut - padding for chunk in chunks[:-1])


def test_slots_of_an_8bit_arena():
    slots, nbytes = plan_slots([SMALLEST_8BIT - 1, SMALLEST_8BIT, 70_001], 8, first_counter=1 << 40)
    assert [slot.bits for slot in slots] == [32, 8, 8]
    assert [slot.counter - (1 << 40) for slot in slots] == [0, 4096, 8192]
    bytes_per_element = (nbytes - 8 * SMALLEST_8BIT) / (SMALLEST_8BIT + 70_001)
    assert bytes_per_element == pytest.approx(2 * (1 + 4 / 256), rel=1e-2)


@pytest.mark.parametrize("look_ahead", [0, 1, 2, 5])
@pytest.mark.parametrize("n_chunks", [0, 1, 2, 7])
def test_schedule(n_chunks, look_ahead):
    actions = plan_schedule(n_chunks, look_ahead)
    position = {(action.kind, action.chunk): index for index, action in enumerate(actions)}
    assert len(position) == len(actions) == 2 * n_chunks
    for chunk in range(n_chunks):
        update = position["update", chunk]
        assert position["prefetch", chunk] < update  # never used before its prefetch
        for ahead in range(chunk, min(chunk + look_ahead + 1, n_chunks)):
            assert position["prefetch", ahead] < update  # all chunks in the window have been requested
        for beyond in range(chunk + look_ahead + 1, n_chunks):
            assert position["prefetch", beyond] > update
    for index, action in enumerate(actions):
        if action.kind == "prefetch":
            expected = action.chunk - look_ahead - 1
            assert action.after == (expected if expected >= 0 else None)
            assert action.after is None or position["update", action.after] < index
        else:
            assert action.after is None


def test_schedule_spelled_out():
    assert plan_schedule(4, 1) == (
        Action("prefetch", 0),
        Action("prefetch", 1),
        Action("update", 0),
        Action("prefetch", 2, after=0),
        Action("update", 1),
        Action("prefetch", 3, after=1),
        Action("update", 2),
        Action("update", 3),
    )


@pytest.mark.parametrize("bits", [8, 32])
def test_staging_packs_ranges_and_rebases_segments(bits):
    slots, _ = plan_slots([300, 50_000, 9000], bits)
    for chunk in plan_chunks(slots, [0, 0, 0], 60_000):
        segments, offsets, nbytes = plan_staging(chunk)
        assert nbytes == chunk.nbytes
        origin = {}
        for (start, stop), offset in zip(chunk.ranges, offsets, strict=True):
            origin.update(zip(range(offset, offset + stop - start), range(start, stop), strict=True))
        assert len(origin) == nbytes
        for moved, segment in zip(segments, chunk.segments, strict=True):
            assert moved[:3] == segment[:3]
            assert moved.counter == segment.counter
            for (start, stop), (first, last) in zip(spans_of(moved), spans_of(segment), strict=True):
                assert (origin[start], origin[stop - 1]) == (first, last - 1)
