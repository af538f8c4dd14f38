"""Detection of the process that made a collective fail: one that died, stopped, or does not reach the collective.

A process whose collective fails asks the others through the store of the process group. A thread in each process
answers whether its process waits in a collective. A process of the same machine that has ended is known at once; any
other one that does not answer is dead or stopped. If all answer, the lost ones are those that compute while the others
wait for them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch.distributed as dist

from .process_identity import has_ended, own_identity

PERIOD = 1.0
"""Seconds between two reads of the store by the answering thread."""
_ASKED = "lost_workers/asked"
_INNERMOST = 4
"""Frames that are searched for torch.distributed: the call of an op lies between a collective and its caller."""
_COLLECTIVES = os.path.join("torch", "distributed") + os.sep
_WAITS, _COMPUTES = "waits", "computes"


def is_failed_collective(error: RuntimeError) -> bool:
    """Whether an error comes from a collective of gloo or NCCL, as FSDP2 runs them in forward and backward."""
    kinds = tuple(getattr(dist, name) for name in ("DistBackendError", "DistNetworkError") if hasattr(dist, name))
    text = str(error)
    return isinstance(error, kinds) or any(mark in text for mark in ("gloo/", "Gloo", "NCCL", "Connection closed by"))


class AnsweringThread:
    """A context in which a thread answers the question of another process for lost ones.

    store: of the process group.   rank: of this process.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self.store, self.rank = store, rank
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="answers which process is lost", daemon=True)

    def __enter__(self) -> AnsweringThread:
        self.store.set(_identity_of(self.rank), own_identity())
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._thread.join(5 * PERIOD)

    def _answer(self) -> None:
        while not self._left.wait(PERIOD):
            try:
                if not self.store.check([_ASKED]):
                    continue
                if not self.store.check([_answer_of(self.rank)]):  # the collective of this process has not failed yet
                    self.store.set(_answer_of(self.rank), _WAITS if _waits_in_collective() else _COMPUTES)
                return
            except RuntimeError:  # the process with the store has ended
                return


def ignore_sigterm() -> None:
    """Ignore SIGTERM until this process ends.

    torchrun sends it to all processes once one has died. A process that has noticed the loss names the lost process and
    ends by itself, and it may get the signal at any point until then.
    """
    if threading.current_thread() is threading.main_thread():  # no other thread can set a handler
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def lost_ranks(store: Any, rank: int, world: int, grace: float) -> list[int]:
    """Return the ranks that are lost, after a collective of this process has failed; empty if none can be told.

    grace: seconds in which processes that are not known to have ended have to answer.
    Raises RuntimeError if the store is gone.
    """
    store.set(_answer_of(rank), _WAITS)
    store.set(_ASKED, "1")
    ends = time.monotonic() + grace
    while silent := [other for other in range(world) if not store.check([_answer_of(other)])]:
        ended = [other for other in silent if _has_ended(store, other)]
        if ended or time.monotonic() > ends:
            return ended or silent
        time.sleep(0.2)
    others = (other for other in range(world) if other != rank)
    return [other for other in others if store.get(_answer_of(other)) == _COMPUTES.encode()]


def _answer_of(rank: int) -> str:
    return f"lost_workers/{rank}"


def _identity_of(rank: int) -> str:
    return f"lost_workers/process/{rank}"


def _has_ended(store: Any, rank: int) -> bool:
    key = _identity_of(rank)
    return store.check([key]) and has_ended(store.get(key).decode())


def _waits_in_collective() -> bool:
    """Whether a thread of this process, other than this one, is inside a collective."""
    own = threading.get_ident()
    return any(_is_in_collective(frame) for thread, frame in sys._current_frames().items() if thread != own)


def _is_in_collective(frame: FrameType | None) -> bool:
    for _ in range(_INNERMOST):
        if frame is None:
            return False
        if _COLLECTIVES in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
