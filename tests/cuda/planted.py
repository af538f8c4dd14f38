"""Faults planted in a CUDA source for the emulator, all in one compilation: a call chooses the one that is active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support import cuda_host
from tests.support.planted_source import NONE, VARIABLE, with_fault

from .launching import source

_CHOICE = f"""static int {VARIABLE} = {NONE};
extern "C" int plant_fault(int number) {{ return {VARIABLE} = number; }}
"""


class Fault(NamedTuple):
    """An expression of the source, which occurs once, and a wrong one of the same type. case: what detects it."""

    name: str
    right: str
    wrong: str
    case: int


class PlantedLibrary:
    """csrc/cuda/<stem>.cu with every fault behind a condition.

    instances: text -> replacement, to compile fewer instances of the kernels.
    """

    def __init__(
        self, stem: str, faults: Sequence[Fault], folder: Path, instances: Mapping[str, str] | None = None
    ) -> None:
        (path,) = source(stem)
        text = path.read_text()
        for old, new in (instances or {}).items():
            assert old in text, f"{path.name} no longer contains {old!r}: bring the test up to date"
            text = text.replace(old, new)
        for number, fault in enumerate(faults, NONE + 1):
            text = with_fault(text, path.name, fault.right, fault.wrong, number)
        mutated = folder / path.name
        mutated.write_text(_CHOICE + text)
        self.library = cuda_host.build([mutated], "plain", include=[path.parent])
        self._faults = list(faults)

    def plant(self, fault: Fault | None) -> cuda_host.Library:
        """Activate a fault, or none; return the library."""
        number = NONE if fault is None else self._faults.index(fault) + 1
        assert self.library.call("plant_fault", number) == number
        return self.library

    def close(self) -> None:
        """End the library's process."""
        self.library.close()
