"""Activates each planted fault and runs the tests that must detect it; the package describes the command."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import pytest
import torch.fx.experimental.symbolic_shapes  # noqa: F401 - autograd imports it, which takes longer than most tests
from _pytest.runner import runtestprotocol

from qlora_kernels.backends import cpu
from tests.support.planted_source import NONE, VARIABLE

from .amx_faults import AMX_FAULTS
from .fault import AMX, BEST, BF16, Fault
from .library import build
from .linear_faults import LINEAR_FAULTS
from .other_faults import OTHER_FAULTS

FAULTS = (*AMX_FAULTS, *LINEAR_FAULTS, *OTHER_FAULTS)
SECONDS = 1200
"""Limit for a fault that makes a loop endless; the tests take seconds, and minutes on a busy machine."""


def supported_sets() -> str:
    """Return the names of the instruction sets of this machine. Loads the library of the package."""
    names = []
    for isa in (BF16, "avx512", "avx2", "portable", AMX):
        with suppress(ValueError):
            names.append(cpu.instruction_set(isa))
    return " ".join(names)


class Detection:
    """A plugin of pytest that runs each fault's tests in a process of its own.

    found: name of the fault -> the first test that failed, or "".
    """

    def __init__(self, faults: Sequence[Fault], active: ctypes.c_int, best: str) -> None:
        self.faults, self.active, self.best = faults, active, best
        self.found: dict[str, str] = {}

    def isa_of(self, fault: Fault) -> str:
        """Return the name of the fault's instruction set."""
        return self.best if fault.isa == BEST else fault.isa

    def detects(self, item: pytest.Item, fault: Fault) -> bool:
        """Whether the fault's entry names the test."""
        params = item.callspec.params if hasattr(item, "callspec") else {}
        isa, backend = params.get("isa", self.isa_of(fault)), params.get("backend", "cpu")
        return item.nodeid.startswith(fault.test) and isa == self.isa_of(fault) and backend == "cpu"

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests of every fault under the fault, and those that run first once without one."""
        tests: dict[str, list[pytest.Item]] = {}
        for fault in self.faults:
            items = [item for item in session.items if self.detects(item, fault)]
            assert items, f"{fault.name}: no test is named {fault.test} for {self.isa_of(fault)}"
            tests[fault.name] = sorted(items, key=lambda item: fault.first not in item.nodeid)
        for isa in sorted({self.isa_of(fault) for fault in self.faults}):
            own = dict.fromkeys(tests[fault.name][0] for fault in self.faults if self.isa_of(fault) == isa)
            self.report("", isa, in_a_process(partial(self.first_failure, NONE, isa, list(own))))
        for number, fault in enumerate(self.faults, NONE + 1):
            isa = self.isa_of(fault)
            self.report(fault.name, isa, in_a_process(partial(self.first_failure, number, isa, tests[fault.name])))
        return True

    def first_failure(self, number: int, isa: str, items: Sequence[pytest.Item]) -> str:
        """Return the first test that fails under a fault, or ""."""
        self.active.value = number
        for item in items:
            cpu.instruction_set(isa)  # the fixtures of the tests restore the automatic choice
            if any(report.failed for report in runtestprotocol(item, log=False, nextitem=None)):
                return item.nodeid
        return ""

    def report(self, name: str, isa: str, test: str) -> None:
        """Keep and print one result."""
        self.found[name or f"without a fault, {isa}"] = test
        word = ("FAILS" if test else "passes") if not name else "detected" if test else "NOT DETECTED"
        sys.stdout.write(f"{word:12}  {name or 'without a fault'} [{isa}]  {test}\n")
        sys.stdout.flush()

    @property
    def failed(self) -> bool:
        """Whether a fault was not detected, or a test fails without one."""
        return any(bool(test) == name.startswith("without a fault") for name, test in self.found.items())


def in_a_process(run: Callable[[], str]) -> str:
    """Return the result of `run` in a forked process, because a fault may end it or write to wrong addresses."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            signal.alarm(SECONDS)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                os.write(write, run().encode())
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as result:
        found = result.read().decode()
    _, status = os.waitpid(process, 0)
    return found if status == 0 else f"the process ended with status {status}"


def main(arguments: Sequence[str]) -> int:
    """Print what detects each fault; return the exit code."""
    everything, words = "--all" in arguments, [word for word in arguments if word != "--all"]
    # In a process of its own, because a process can load only one library with these ops.
    names = in_a_process(supported_sets).split()
    best = names[0]
    chosen = [fault for fault in FAULTS if fault.isa in (BEST, best, AMX) or everything]
    chosen = [fault for fault in chosen if fault.isa == BEST or fault.isa in names]
    chosen = [fault for fault in chosen if not words or any(word in fault.name for word in words)]
    sets = {best if fault.isa == BEST else fault.isa for fault in chosen}
    cpu.LIBRARY = build(chosen, sets | ({BF16} if AMX in sets else set()))
    assert (reason := cpu.unavailable()) is None, reason
    active = ctypes.c_int.in_dll(ctypes.CDLL(str(cpu.LIBRARY)), VARIABLE)
    detection = Detection(chosen, active, best)
    files = sorted({fault.test.partition("::")[0] for fault in chosen})
    code = pytest.main(
        ["-qq", "--no-header", "--no-summary", "--assert=plain", "--tb=native", "-p", "no:cacheprovider", *files],
        plugins=[detection],
    )
    return int(code != pytest.ExitCode.OK or detection.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
