"""The memory limit of a container binds a run as the machine's memory does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_kernels.cli import container_memory, device
from qlora_kernels.cli.container_memory import MemoryLimit, memory_limits


@pytest.mark.parametrize(
    ("group", "names", "counts"),
    [
        ("", ("memory.max", "memory.current"), "anon 7\ninactive_file 50\n"),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "cache 60\ntotal_inactive_file 50\n"),
    ],
    ids=["version 2", "version 1"],
)
def test_limit_of_a_control_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: str, names: tuple[str, str], counts: str
) -> None:
    """The limit of an outer group binds too, and the cache that the system can reclaim counts as free."""
    monkeypatch.setattr(container_memory, "_own_group", lambda controller: "outer/inner")
    outer = tmp_path / group / "outer"
    (outer / "inner").mkdir(parents=True)
    for name, text in ((names[0], "1000\n"), (names[1], "300\n"), ("memory.stat", counts)):
        (outer / name).write_text(text)
    assert memory_limits(tmp_path) == [MemoryLimit(1000, 250)]


def test_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(container_memory, "_own_group", lambda controller: "")
    for name, text in (("memory.max", "max\n"), ("memory.current", "300\n"), ("memory.stat", "")):
        (tmp_path / name).write_text(text)
    assert memory_limits(tmp_path) == []
    assert memory_limits(tmp_path / "absent") == []


def test_memory_of_the_cpu_is_the_lowest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=10))
    for limits, expected in (
        ([], 1010),
        ([MemoryLimit(400, 0), MemoryLimit(300, 0)], 310),
        ([MemoryLimit(1 << 63, 0)], 1010),
    ):
        monkeypatch.setattr(device, "memory_limits", lambda limits=limits: limits)
        assert device.memory_bytes(torch.device("cpu")) == expected
