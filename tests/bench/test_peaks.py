"""Every device has all four peaks, by probes or by stand-ins."""

from __future__ import annotations

import pytest

from bench import peaks

NAMES = {"read", "copy", "bf16", "fma"}


@pytest.fixture
def little_work(monkeypatch):
    monkeypatch.setattr(peaks, "_working_set", lambda device: 1 << 20)
    monkeypatch.setattr(peaks, "STAND_IN_S", 0.0)


@pytest.mark.usefixtures("little_work")
def test_peaks():
    measured = peaks.measure_peaks("cpu")
    assert measured.keys() == NAMES
    assert all(peak.rate > 1e6 for peak in measured.values())


@pytest.mark.usefixtures("little_work")
def test_stand_ins(monkeypatch):
    monkeypatch.setattr(peaks, "_library", lambda: None)
    measured = peaks.measure_peaks("cpu", "avx2")
    assert measured.keys() == NAMES
    assert {peak.how for peak in measured.values()} == {"torch.sum", "torch.copy_", "torch.matmul"}
