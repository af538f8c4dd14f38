"""The layout of optimizer states, their division into chunks, and the order in which chunks are fetched.

These are pure functions of sizes, without tensors, devices or clocks. The memories (resident, mapped, managed, staged)
execute their plans, so that the order of prefetches is tested without a GPU.

    arena    one block of bytes; each parameter's states are contiguous in it, in the order of the parameters
    slot     the offsets of one parameter's states
    chunk    several slots, or a part of a large one, of about `chunk_bytes` of state; never of two param groups
    schedule prefetch(i + look_ahead) is enqueued before update(i), so that copies overlap with computation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..ops.adamw_step import STATE_BLOCKSIZE, Segment
from ..rounding import cdiv, round_up

ALIGNMENT = 64
"""Alignment in bytes: a cache line and the widest vector load."""

CUT = ALIGNMENT // 4 * STATE_BLOCKSIZE
"""Large parameters are split at multiples of this number of elements, so that chunks share no line of absmax."""

SMALLEST_8BIT = 4096
"""Parameters with fewer elements, such as norms and biases, keep 32-bit states: they are sensitive and small."""


@dataclass(frozen=True)
class Slot:
    """The byte offsets of one parameter's states in the arena, and its start in the count for stochastic rounding."""

    numel: int
    bits: int
    exp_avg: int
    exp_avg_sq: int
    exp_avg_absmax: int
    exp_avg_sq_absmax: int
    counter: int

    def nbytes(self, count: int) -> int:
        """Return the bytes of state of `count` elements from the start of a block."""
        return sum(nbytes for _, nbytes in self.spans(0, count))

    def spans(self, start: int, count: int) -> list[tuple[int, int]]:
        """Return (offset, bytes) in the arena of each state of elements [start, start + count)."""
        width, block = self.bits // 8, start // STATE_BLOCKSIZE
        spans = [(self.exp_avg + start * width, count * width), (self.exp_avg_sq + start * width, count * width)]
        if self.bits == 8:
            nbytes = 4 * cdiv(count, STATE_BLOCKSIZE)
            spans += [(self.exp_avg_absmax + 4 * block, nbytes), (self.exp_avg_sq_absmax + 4 * block, nbytes)]
        return spans

    def segment(self, param: int, start: int, count: int) -> Segment:
        """Return the kernel's segment row of elements [start, start + count)."""
        offsets = [offset for offset, _ in self.spans(start, count)]
        exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax = [*offsets, -1, -1][:4]
        return Segment(
            param, start, count, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, self.counter + start
        )


@dataclass(frozen=True)
class Chunk:
    """The segments that one kernel call updates, whose parameters are numbered from `first_param` on."""

    group: int
    first_param: int
    last_param: int
    segments: tuple[Segment, ...]
    ranges: tuple[tuple[int, int], ...]
    """The byte ranges [start, stop) of the arena that the segments use, merged and in order."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of state in the chunk."""
        return sum(stop - start for start, stop in self.ranges)


class Action(NamedTuple):
    """One step of a schedule.

    prefetch: fetch the chunk's bytes after the update of chunk `after` (None: at once).
    update: run the kernel on the chunk after its prefetch.
    """

    kind: Literal["prefetch", "update"]
    chunk: int
    after: int | None = None


def plan_slots(numels: Sequence[int], state_bits: int, *, first_counter: int = 0) -> tuple[tuple[Slot, ...], int]:
    """Return slots in the parameters' order, and the arena's size in bytes. Offsets are multiples of ALIGNMENT."""
    slots: list[Slot] = []
    offset, counter = 0, first_counter

    def take(nbytes: int) -> int:
        nonlocal offset
        start = offset
        offset = _aligned(offset + nbytes)
        return start

    for numel in numels:
        bits = 32 if numel < SMALLEST_8BIT else state_bits
        blocks = cdiv(numel, STATE_BLOCKSIZE)
        exp_avg, exp_avg_sq = take(numel * bits // 8), take(numel * bits // 8)
        absmax, sq_absmax = (take(4 * blocks), take(4 * blocks)) if bits == 8 else (-1, -1)
        slots.append(Slot(numel, bits, exp_avg, exp_avg_sq, absmax, sq_absmax, counter))
        counter += blocks * STATE_BLOCKSIZE
    return tuple(slots), offset


def plan_chunks(slots: Sequence[Slot], groups: Sequence[int | None], chunk_bytes: int | None) -> tuple[Chunk, ...]:
    """Return chunks that cover every element once, in order.

    groups: each slot's param group, or None for a slot that is not updated. chunk_bytes: None makes one chunk per
    group. A chunk has at most `chunk_bytes` of state, without padding, but at least CUT elements or a whole parameter.
    """
    chunks: list[Chunk] = []
    pieces: list[tuple[int, Slot, int, int]] = []  # (param, slot, start, count) of the current chunk
    room, group_of_pieces = 0.0, 0

    def close() -> None:
        if pieces:
            chunks.append(_chunk(pieces, group_of_pieces))
            pieces.clear()

    for param, (slot, group) in enumerate(zip(slots, groups, strict=True)):
        if group is None:
            continue
        if group != group_of_pieces:
            close()
        group_of_pieces = group
        start = 0
        while start < slot.numel:
            if not pieces:
                room = float("inf") if chunk_bytes is None else max(chunk_bytes, slot.nbytes(min(CUT, slot.numel)))
            count = slot.numel - start
            if slot.nbytes(count) > room:
                count = int(room // slot.nbytes(CUT)) * CUT
            if count == 0:
                close()
                continue
            pieces.append((param, slot, start, count))
            room -= slot.nbytes(count)
            start += count
    close()
    return tuple(chunks)


def plan_schedule(n_chunks: int, look_ahead: int) -> tuple[Action, ...]:
    """Return the order in which actions are enqueued. At most look_ahead + 1 chunks are on the device at any time.

    prefetch(c) waits for update(c - look_ahead - 1). Otherwise the copy stream would fetch the whole arena at once, and
    the first chunks would be evicted before their update.
    """
    actions = [Action("prefetch", chunk) for chunk in range(min(look_ahead, n_chunks))]
    for chunk in range(n_chunks):
        ahead = chunk + look_ahead
        if ahead < n_chunks:
            actions.append(Action("prefetch", ahead, chunk - 1 if chunk > 0 else None))
        actions.append(Action("update", chunk))
    return tuple(actions)


def plan_staging(chunk: Chunk) -> tuple[tuple[Segment, ...], tuple[int, ...], int]:
    """Plan the chunk in a separate buffer: segments with new offsets, each range's start there, and the buffer's
    size.
    """
    offsets, end = [], 0
    for start, stop in chunk.ranges:
        offsets.append(end)
        end += stop - start

    def rebased(offset: int) -> int:
        if offset < 0:
            return offset
        index = next(i for i, (start, stop) in enumerate(chunk.ranges) if start <= offset < stop)
        return offset - chunk.ranges[index][0] + offsets[index]

    segments = tuple(
        segment._replace(
            exp_avg=rebased(segment.exp_avg),
            exp_avg_sq=rebased(segment.exp_avg_sq),
            exp_avg_absmax=rebased(segment.exp_avg_absmax),
            exp_avg_sq_absmax=rebased(segment.exp_avg_sq_absmax),
        )
        for segment in chunk.segments
    )
    return segments, tuple(offsets), end


def _chunk(pieces: Sequence[tuple[int, Slot, int, int]], group: int) -> Chunk:
    first, last = pieces[0][0], pieces[-1][0]
    segments = tuple(slot.segment(param - first, start, count) for param, slot, start, count in pieces)
    spans = [span for _, slot, start, count in pieces for span in slot.spans(start, count)]
    ranges = [(offset, _aligned(offset + nbytes)) for offset, nbytes in spans]
    return Chunk(group, first, last, segments, _merged(ranges))


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Merge touching and overlapping ranges."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _aligned(offset: int) -> int:
    return round_up(offset, ALIGNMENT)
