"""A lost process is named, and SIGTERM, which a launcher sends to the others, does not prevent it at any point."""

from __future__ import annotations

import signal
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

import qlora_kernels
from qlora_kernels.cli.interrupts import deferred, ended_by_sigterm
from qlora_kernels.training import LostWorkerError, Workers, joined, lost_workers, workers

PACKAGE = str(Path(qlora_kernels.__file__).parent)
FAILURE = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"


@pytest.fixture
def fails_after(monkeypatch):
    """Rank 1 of 2 has ended, so that a collective of this process fails; returns a function to set what runs then."""
    store = dist.HashStore()
    monkeypatch.setattr(workers, "_store", lambda: store)
    monkeypatch.setattr(lost_workers, "_has_ended", lambda store, rank: rank == 1)
    monkeypatch.setattr(Workers, "current", classmethod(lambda cls: cls(0, 2)))

    def set_failure(before_failure):
        def all_reduce(value):
            before_failure()
            raise RuntimeError(FAILURE)

        monkeypatch.setattr(dist, "all_reduce", all_reduce)

    before = signal.getsignal(signal.SIGTERM)
    yield set_failure
    signal.signal(signal.SIGTERM, before)


class SignalAtLine:
    """Send SIGTERM to this process before the given line, counted from `start`, that it executes in the package."""

    def __init__(self, line: int) -> None:
        self.line, self.executed = line, 0

    def start(self) -> None:
        frame = sys._getframe()
        while frame is not None:  # functions that are called already
            frame.f_trace = self._trace
            frame = frame.f_back
        sys.settrace(self._trace)

    def _trace(self, frame, event, _argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.executed += 1
            if self.executed == self.line:
                signal.raise_signal(signal.SIGTERM)
        return self._trace


def _run(defers):
    """Run one step of a worker in the contexts of the command `finetune`. Returns the error that it reports."""
    with ended_by_sigterm():
        try:
            with joined({}, timedelta(seconds=1)) as group:
                if not defers:
                    group.total(1.0)
                with deferred("training stops"), group.naming_the_lost():
                    group.total(1.0)
        except LostWorkerError as error:
            return str(error)


@pytest.mark.parametrize("defers", [True, False], ids=["in training", "elsewhere"])
def test_sigterm_at_any_line_does_not_prevent_the_error(fails_after, defers):
    tracing, line, executed = sys.gettrace(), 0, 1
    while line <= executed:  # line 0 is none
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        at_line = SignalAtLine(line)
        fails_after(at_line.start)
        try:
            error = _run(defers)
        finally:
            sys.settrace(tracing)
        assert error.startswith("rank 1 of 2 must answer, got none; the run stops ([gloo/"), line
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        line, executed = line + 1, max(executed, at_line.executed)
    assert executed > 30


def test_sigterm_without_a_lost_process_ends_the_command(fails_after):
    fails_after(lambda: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        _run(defers=False)
    assert signal.getsignal(signal.SIGTERM) == before
