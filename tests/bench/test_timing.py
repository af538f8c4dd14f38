"""Interleaved timing of implementations."""

from __future__ import annotations

import time

import pytest
import torch

from bench import timing
from bench.timing import Budget, TimedCalls, measure, summarize


@pytest.fixture
def two_threads():
    """Run with two torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_summary():
    summary = summarize([1.0, 2.0, 3.0, 4.0, 100.0], foreign=0.5)
    assert (summary.median, summary.samples, summary.foreign) == (3.0, 5, 0.5)
    assert summary.p10 < 2.0 < 4.0 < summary.p90


def test_implementations_alternate_over_all_copies(monkeypatch):
    monkeypatch.setattr(timing, "TURN_S", 0.0)
    order = []
    implementations = {
        "a": TimedCalls([lambda: order.append("a0"), lambda: order.append("a1")], threads=1),
        "b": TimedCalls([lambda: order.append("b")], threads=1),
    }
    timed = measure(implementations, "cpu", Budget(rounds=2, samples=2, seconds=5.0))
    calibration, rounds = order[:2], order[2:]
    assert calibration == ["a0", "b"]
    assert rounds[:4] == ["a1", "b", "a0", "b"]
    assert timed.keys() == implementations.keys()


def test_times_and_threads(two_threads):
    seen = set()

    def call():
        seen.add(torch.get_num_threads())
        time.sleep(0.005)

    timed = measure({"sleep": TimedCalls([call], threads=1)}, "cpu", Budget(rounds=1, samples=1, seconds=0.0))
    assert timed["sleep"].median >= 0.005
    assert seen == {1}
    assert torch.get_num_threads() == 2


def test_quiet_rounds_are_preferred(monkeypatch):
    shares = iter([0.9, 0.0, 0.5, 0.01, 0.02])
    times = iter([9.0, 1.0, 5.0, 1.1, 1.2])

    def run_round(*arguments):
        return timing._Round(next(shares), {"a": [next(times)]})

    monkeypatch.setattr(timing, "_run_round", run_round)
    monkeypatch.setattr(timing, "_turn_length", lambda *arguments: 1)
    timed = measure({"a": TimedCalls([list], threads=1)}, "cpu", Budget(rounds=3, samples=3, seconds=60.0))
    assert timed["a"].median == pytest.approx(1.1)
    assert timed["a"].foreign == pytest.approx(0.01)


def test_at_least_three_rounds_after_time_limit(monkeypatch):
    monkeypatch.setattr(timing, "_run_round", lambda *arguments: timing._Round(0.5, {"a": [next(times)]}))
    monkeypatch.setattr(timing, "_turn_length", lambda *arguments: 1)
    times = iter([9.0, 1.0, 2.0])
    timed = measure({"a": TimedCalls([list], threads=1)}, "cpu", Budget(seconds=0.0))
    assert (timed["a"].median, timed["a"].samples) == (2.0, 3)
