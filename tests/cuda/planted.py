"""Faults planted in a CUDA source for the emulator, all in one compilation: a call chooses the one that is active."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support import cuda_host
from tests.support.cuda_host.toolchain import ROOT
from tests.support.planted_source import NONE, VARIABLE, with_fault

from .launching import source

_CHOICE = f"""static int {VARIABLE} = {NONE};
extern "C" int plant_fault(int number) {{ return {VARIABLE} = number; }}
"""


class Fault(NamedTuple):
    """A text of the source, which occurs once, and a wrong one: an expression of the same type, or a whole statement.

    A statement ends with a semicolon, after which a comment may follow; its wrong text may be empty.
    case: what detects the fault.
    """

    name: str
    right: str
    wrong: str
    case: int


def _wrong(number: int) -> str:
    return f"<wrong text {number}>"


class PlantedLibrary:
    """csrc/cuda/<stem>.cu with every fault behind a condition.

    instances: text -> replacement, to compile fewer instances of the kernels.   headers: of the project, whose text is
    part of the source, so that faults can be planted in them; a header that includes another one is listed before it.
    """

    def __init__(
        self,
        stem: str,
        faults: Sequence[Fault],
        folder: Path,
        instances: Mapping[str, str] | None = None,
        headers: Sequence[str] = (),
    ) -> None:
        (path,) = source(stem)
        text = path.read_text()
        for header in headers:
            (found,) = (ROOT / "csrc").rglob(header)
            assert f'{header}"' in text
            name = next(line for line in text.splitlines() if line.endswith(f'{header}"'))
            text = text.replace(name, found.read_text().replace("#pragma once", ""), 1).replace(name, "")
        for old, new in (instances or {}).items():
            assert old in text, f"{path.name} no longer contains {old!r}: bring the test up to date"
            text = text.replace(old, new)
        for number, fault in enumerate(faults, NONE + 1):
            # Wrong texts are filled in last, so that none is taken for the right text of another fault.
            text = with_fault(text, path.name, fault.right, _wrong(number), number)
        for number, fault in enumerate(faults, NONE + 1):
            text = text.replace(_wrong(number), fault.wrong)
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


def planted_tests(
    stem: str,
    faults: Sequence[Fault],
    check: Callable[[cuda_host.Library, int], None],
    instances: Mapping[str, str] | None = None,
    headers: Sequence[str] = (),
) -> tuple[Any, Callable[[PlantedLibrary], None], Callable[[PlantedLibrary, Fault], None]]:
    """Return the fixture `planted` and the two tests of faults: each case passes as it is, and fails under its faults.

    check(library, case): compares results and raises where they are wrong.   The others: as of PlantedLibrary.
    """

    @pytest.fixture(scope="module")
    def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlantedLibrary]:
        found = PlantedLibrary(stem, faults, tmp_path_factory.mktemp(stem), instances, headers)
        yield found
        found.close()

    def test_checks_pass_without_a_fault(planted: PlantedLibrary) -> None:
        for case in sorted({fault.case for fault in faults}):
            check(planted.plant(None), case)

    @pytest.mark.parametrize("fault", faults, ids=lambda fault: fault.name)
    def test_planted_fault_is_detected(planted: PlantedLibrary, fault: Fault) -> None:
        with pytest.raises((AssertionError, cuda_host.KernelFault, cuda_host.SanitizerReport)):
            check(planted.plant(fault), fault.case)

    return planted, test_checks_pass_without_a_fault, test_planted_fault_is_detected
