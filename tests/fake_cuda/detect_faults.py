"""Runs the calls of calls.py under each planted fault of the CUDA library, each in a process of its own.

    python -m tests.fake_cuda.detect_faults LIBRARY

It prints a JSON object: fault -> the first call that fails under it, with the error, or "" if none fails. The key "" is
the library without a fault.
LIBRARY: made by tests.fake_cuda.planted.py.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.support import fake_cuda

DEVICE = fake_cuda.activate(devices=2)

import torch  # noqa: E402 - after the fake device
import torch.fx.experimental.symbolic_shapes  # noqa: E402 - autograd imports it, which takes longer than a call

from tests.support.fake_cuda import host_ops  # noqa: E402

host_ops.install()

import qlora_kernels as qk  # noqa: E402
from qlora_kernels.backends.cuda import availability  # noqa: E402

from .calls import CALLS, EXPECTED, check, check_on_a_side_stream, expected  # noqa: E402
from .planted import ACTIVE, NAMES, NOT_CLEARED  # noqa: E402

INVALID_VALUE = 1


def on_the_second_device(name: str) -> None:
    """Run one call on cuda:1 while cuda:0 is the current device."""
    torch.zeros(1, device="cuda:0")
    with qk.use_backend("cuda"):
        results = CALLS[name]("cuda:1")
    assert torch.cuda.current_device() == 0
    check(name, results)


def after_a_failure(name: str) -> None:
    """Check that a failing runtime call of the library leaves no error behind."""
    failing = DEVICE.failing(INVALID_VALUE, caller=availability.LIBRARY.name)
    with qk.use_backend("cuda"), failing, suppress(RuntimeError):
        CALLS[name]("cuda")
    assert DEVICE.pending_error() == 0, "an error is pending"


CHECKS: dict[str, Callable[[str], None]] = {
    "guard": on_the_second_device,
    "stream": check_on_a_side_stream,
    NOT_CLEARED: after_a_failure,
}


def first_failure(fault: str) -> str:
    """Return the first call that fails under `fault`, with its error; "" if none does."""
    os.environ[ACTIVE] = fault
    if reason := availability.unavailable():
        return reason
    DEVICE.set_schedule("lazy")  # a stream runs only as far as something waits for it
    checks = [check for kind, check in CHECKS.items() if not fault or fault.startswith(kind)]
    for name in CALLS:
        for run in checks:
            try:
                run(name)
            except Exception as error:
                return f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def in_a_process(run: Callable[[], str]) -> str:
    """Return the result of `run` in a forked process, because a failed call leaves errors and devices behind."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(write, run().encode()[:1000])
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as result:
        found = result.read().decode(errors="replace")
    _, status = os.waitpid(process, 0)
    return found if status == 0 else f"the process ended with status {status}"


def save_expected(path: str) -> str:
    """Write the results of all calls on the CPU to a file; return ""."""
    torch.save({name: expected(name) for name in CALLS}, path)
    return ""


def main() -> None:
    """Print what was found."""
    availability.LIBRARY = Path(sys.argv[1])
    faults = availability.LIBRARY.with_name(NAMES).read_text().splitlines()
    with tempfile.NamedTemporaryFile() as file:  # autograd refuses to run here and in a forked process, too
        in_a_process(lambda: save_expected(file.name))
        EXPECTED.update(torch.load(file.name))
    found = {fault: in_a_process(partial(first_failure, fault)) for fault in ("", *faults)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
