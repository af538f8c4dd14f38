"""Calls of every op with sound and unsound arguments: none may end the process or write outside its arguments.

    python -m tests.fuzz.native_ops --calls 100000 --seed 0      exit code 1 and the call's number for a failure

The calls run in child processes, each a range of numbers; a call is determined by its number.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import qlora_kernels as qk
from qlora_kernels.backends import cpu, cuda

from .op_arguments import Problem, sound
from .unsound import unsound

ADDRESS_SPACE = 12 << 30
"""Size limit in bytes; larger sizes fail as allocations do, without using other processes' memory."""

PER_CHILD = 10_000

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, MemoryError, AssertionError)
"""Exceptions that count as refusals. AssertionError is raised by torch for mixed kinds of tensors in one call."""


class StrayWrite(Exception):
    """A call wrote outside its arguments, or left the dispatcher's state changed."""


def ops() -> list[Any]:
    """Return every op of both namespaces that is loaded."""
    assert cpu.unavailable() is None
    cuda.load()
    overloads = []
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, _, rest = name.partition("::")
        if namespace in ("qlora_kernels", "qlora_kernels_C"):
            packet, _, overload = rest.partition(".")
            overloads.append(getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default"))
    return overloads


def call(op: Any, number: int) -> str:
    """Return the outcome of call `number`: "done", or the type of the refusal. Raises StrayWrite."""
    rng = random.Random(number)
    torch.manual_seed(number)
    problem = Problem(rng)
    names, values, keywords = [], [], {}
    for argument in op._schema.arguments:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        value = sound(op._schema.name, argument.name, str(argument.type), problem, is_written)
        names.append(argument.name)
        values.append(value)
    places = rng.sample(range(len(values)), min(len(values), rng.choice((0, 1, 1, 1, 2, 3))))
    changes = {place: unsound(values[place], rng) for place in places}
    # torch's fake mode corrupts the dispatcher's state when it raises for another argument that is freed memory.
    fakes = {place: value for place, value in changes.items() if _has_fake(value)}
    for place, value in (fakes or changes).items():
        values[place] = value
    if rng.random() < 0.05 and not fakes:  # two arguments in one memory
        tensors = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        if len(tensors) > 1:
            a, b = rng.sample(tensors, 2)
            values[a] = values[b]
            problem.blocks.clear()
    for argument, value in list(zip(op._schema.arguments, values, strict=True)):
        if argument.kwarg_only:
            keywords[argument.name] = value
    values = values[: len(values) - len(keywords)]
    backend = rng.choice((None, None, "cpu", "reference"))
    dispatcher = _dispatcher_state()
    try:
        with torch.set_grad_enabled(rng.random() < 0.3), torch.inference_mode(rng.random() < 0.1):
            if backend is None:
                op(*values, **keywords)
            else:
                with qk.use_backend(backend):
                    op(*values, **keywords)
        outcome = "done"
    except REFUSALS as error:
        outcome = type(error).__name__
    for block in problem.blocks:
        if not block.is_intact():
            raise StrayWrite(f"{op}: call {number} wrote outside its arguments")
    if _dispatcher_state() != dispatcher:
        raise StrayWrite(f"{op}: call {number} left the dispatcher's state of this thread changed")
    return outcome


def _has_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor) or (isinstance(value, list) and any(map(_has_fake, value)))


def _dispatcher_state() -> tuple[int, int]:
    """Return the dispatch keys that this thread excludes and includes; if changed, they break later calls of ops."""
    exclude, include = torch._C._dispatch_tls_local_exclude_set(), torch._C._dispatch_tls_local_include_set()
    return exclude.raw_repr(), include.raw_repr()


def run(first: int, last: int, report: Path) -> None:
    """Run calls [first, last); `report` contains the number of the current one."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(2)
    overloads, outcomes = ops(), Counter[str]()
    with report.open("w", encoding="utf-8", buffering=1) as file:
        for number in range(first, last):
            op = overloads[number % len(overloads)]
            file.seek(0)
            file.write(f"{number} {op}\n")
            outcomes[f"{op._schema.name.split('::')[0]} {call(op, number)}"] += 1
    sys.stdout.write(", ".join(f"{outcome}: {count}" for outcome, count in sorted(outcomes.items())) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the calls in child processes. Returns 1 if one of them died or reported a stray write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first call")
    parser.add_argument("--report", type=Path, default=Path("out/native_fuzz.txt"))
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        run(options.child, options.child + options.calls, options.report)
        return 0
    options.report.parent.mkdir(parents=True, exist_ok=True)
    lost = 0
    for first in range(options.seed, options.seed + options.calls, PER_CHILD):
        count = min(PER_CHILD, options.seed + options.calls - first)
        command = [sys.executable, "-W", "ignore", "-m", __spec__.name, "--child", str(first)]
        command += ["--calls", str(count), "--report", str(options.report)]
        code = subprocess.run(command, env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}, check=False).returncode
        if code != 0:
            lost += 1
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            sys.stdout.write(f"lost: {how} at call {options.report.read_text().strip()}\n")
    sys.stdout.write(f"native ops: {options.calls} calls tried, {lost} lost\n")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
