"""The registry: the kernels of each backend, and the choice of one for a problem.

A backend is a module that defines

    KERNELS: tuple[KernelSpec, ...]
    def unavailable() -> str | None       None if it can run here, otherwise the reason and the fix
    def library_facts() -> dict[str, str]  optional: what its compiled library is built for and uses, by name

Only this module imports backends, by name, when the first op needs one. `select(problem)` returns the usable kernel of
highest priority. A fallback is always reported: a forced backend that cannot run a problem raises with its reasons, and
an automatic fallback to the reference warns once for each (op, reason).
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, wraps
from typing import Any, NamedTuple

import torch

from .tensor_memory import check_memory

BACKENDS = ("reference", "cpu", "triton", "cuda")
"""All backends, named as their modules under qlora_kernels.backends."""

AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
"""Backends of a device that are chosen automatically. `triton` runs on CPU tensors, interpreted, only if forced."""

ENVIRONMENT = "QLORA_BACKEND"

EXACT_ROWS = 16
"""Largest M for which a kernel is chosen by M itself."""


class Problem(NamedTuple):
    """The properties of a call that may influence the choice of a kernel; hashable."""

    op: str
    device: str
    dtype: torch.dtype
    M: int = 0
    N: int = 0
    K: int = 0
    r: int = 0
    blocksize: int = 64
    double_quant: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class KernelPlan:
    """The kernel and tile with which a backend runs a Problem.

    kernel: name of the kernel, or of the library product that follows a decode.   tile: its sizes by name; empty if
    there is nothing to choose.   reason: why this kernel and tile are chosen, in one sentence.
    """

    kernel: str
    tile: dict[str, int]
    reason: str

    def __str__(self) -> str:
        tile = " ".join(f"{name}={size}" for name, size in self.tile.items())
        return f"{self.kernel}{f' [{tile}]' if tile else ''}: {self.reason}"


def only_kernel(problem: Problem) -> KernelPlan:
    """Return the plan of a backend that has one kernel for an op."""
    return KernelPlan(problem.op, {}, "the backend's only kernel of this op")


@dataclass(frozen=True)
class KernelSpec:
    """One backend's implementation of one op.

    run: takes the op's arguments as documented in ops/<op>.py ("kernel contract").
    unsupported: returns the reasons why this kernel cannot run a Problem; empty if it can.
    priority: of this kernel for a Problem; the usable kernel of highest priority runs, among equals the first one
    listed.
    checks_memory: whether the kernel itself refuses tensors without memory, as the native libraries do. Otherwise the
    registry checks before it calls the kernel.
    plan: returns the kernel and tile that `run` uses for a Problem it supports, and the reason; callable on any
    machine.
    """

    op: str
    backend: str
    run: Callable[..., Any]
    unsupported: Callable[[Problem], list[str]]
    priority: Callable[[Problem], int] = lambda problem: 0
    checks_memory: bool = False
    plan: Callable[[Problem], KernelPlan] = only_kernel


def supports_all(problem: Problem) -> list[str]:
    """Return no reasons: the `unsupported` of kernels that run every Problem."""
    return []


@cache
def kernels_of(backend: str) -> dict[str, KernelSpec]:
    """Return the kernels of one backend by op, whether or not they can run here."""
    module = importlib.import_module(f"qlora_kernels.backends.{backend}")
    return {spec.op: spec if spec.checks_memory else _with_memory_checked(spec) for spec in module.KERNELS}


def _with_memory_checked(spec: KernelSpec) -> KernelSpec:
    op, kernel = spec.op, spec.run

    @wraps(kernel)
    def run(*args: Any, **keywords: Any) -> Any:
        check_memory(op, args)
        if keywords:
            check_memory(op, tuple(keywords.values()))
        return kernel(*args, **keywords)

    return replace(spec, run=run)


@cache
def unavailable(backend: str) -> str | None:
    """Return why `backend` cannot run on this machine, with the fix, or None if it can."""
    reason: str | None = importlib.import_module(f"qlora_kernels.backends.{backend}").unavailable()
    return reason


def library_facts(backend: str) -> dict[str, str]:
    """Return what a backend's compiled library is built for and uses, by name, whether or not it can run here.

    A fact that the library cannot give is the reason: it is not built, or the installation is broken.
    """
    facts: Callable[[], dict[str, str]] = getattr(
        importlib.import_module(f"qlora_kernels.backends.{backend}"), "library_facts", dict
    )
    return facts()


def reasons_against(problem: Problem, backend: str) -> list[str]:
    """Return the reasons why `backend` cannot run `problem`; empty if it can."""
    reason = unavailable(backend)
    if reason is not None:
        return [reason]
    spec = kernels_of(backend).get(problem.op)
    if spec is None:
        return [f"it has no kernel for {problem.op}"]
    return spec.unsupported(problem)


def planned_rows(M: int) -> int:
    """Return the number of rows for which a kernel is chosen instead of for M.

    It is M up to 16, then the next multiple of 8 up to 32, of 16 up to 64, of 64 up to 1024, and the next power of two.
    Batches of varying length thus share their choices and the caches of these.
    """
    if M <= EXACT_ROWS:
        return M
    if M <= 1024:
        step = 64 if M > 64 else 16 if M > 32 else 8
        return (M + step - 1) // step * step  # inline, because each call of an op runs this
    return 1 << (M - 1).bit_length()


def device_type(tensor: torch.Tensor) -> str:
    """Return tensor.device.type; for CPUs and GPUs without the new string that each access of it makes."""
    if tensor.is_cpu:
        return "cpu"
    return "cuda" if tensor.is_cuda else tensor.device.type


def select(problem: Problem) -> KernelSpec:
    """Return the kernel that runs `problem`, the same for all M of equal planned_rows.

    Raises NotImplementedError, with every reason, if a forced backend cannot run it.
    """
    # The comparison saves a function call for few rows, where the cost of a call matters most.
    rows = problem.M if problem.M <= EXACT_ROWS else planned_rows(problem.M)
    if rows == problem.M:
        return _select(problem, _forced)
    try:
        return _select(problem._replace(M=rows), _forced)
    except NotImplementedError:
        return _select(problem, _forced)  # the message names the requested problem


@lru_cache(maxsize=4096)
def _select(problem: Problem, forced: str | None) -> KernelSpec:
    if forced is not None:
        reasons = reasons_against(problem, forced)
        if reasons:
            raise NotImplementedError(f"{problem.op}: backend {forced!r} cannot serve {problem}: " + "; ".join(reasons))
        return kernels_of(forced)[problem.op]
    candidates, absent, refused = [], [], []
    for backend in AUTOMATIC.get(problem.device, ("reference",)):
        if (reason := unavailable(backend)) is not None:
            absent.append(f"{backend}: {reason}")
        elif reasons := reasons_against(problem, backend):
            refused.append(f"{backend}: " + "; ".join(reasons))
        else:
            candidates.append(kernels_of(backend)[problem.op])
    best = max(candidates, key=lambda spec: spec.priority(problem))
    if best.backend == "reference" and refused:
        _warn_once(f"{problem.op} runs on the reference backend, which is slow ({' | '.join(refused)})")
    elif best.backend == "reference" and absent:
        # The reason is the same for every op, so one warning is enough.
        _warn_once(f"qlora_kernels runs on its reference backend, which is slow ({' | '.join(absent)})")
    return best


def find(problem: Problem) -> KernelSpec | None:
    """Return the kernel that the first backend of the problem's device, or the forced one, has for `problem`, or None.

    It is for ops that a caller can compose of the kernels of other ops.
    """
    return _find(problem, _forced)


@lru_cache(maxsize=4096)
def _find(problem: Problem, forced: str | None) -> KernelSpec | None:
    backend = forced or AUTOMATIC.get(problem.device, ("reference",))[0]
    return None if reasons_against(problem, backend) else kernels_of(backend)[problem.op]


def plans(problem: Problem) -> dict[str, str]:
    """Return, for each backend, the kernel that it would run for `problem` and why, or the reason why it has none.

    For a backend that cannot run on this machine, the plan of a machine where it can is returned, and the text states
    this.
    """
    answers = {}
    for backend in BACKENDS:
        spec = kernels_of(backend).get(problem.op)
        absent = unavailable(backend)
        if spec is None:
            answers[backend] = f"no kernel for {problem.op}"
        elif absent is None and (reasons := spec.unsupported(problem)):
            answers[backend] = "cannot serve it: " + "; ".join(reasons)
        else:
            answers[backend] = str(spec.plan(problem)) + ("" if absent is None else f" (not available here: {absent})")
    return answers


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _checked(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {BACKENDS}, got {backend!r}")
    return backend


_forced: str | None = _checked(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the block onto one backend: "reference", "cpu", "triton" or "cuda".

    The choice applies to the whole process, because backward passes run on autograd's threads. Raises ValueError for an
    unknown name; ops raise NotImplementedError, with the reasons, if the backend cannot run them.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


def backends() -> dict[str, str]:
    """Return the state of each backend by name: "available", with its ops, or the reason why it is not.

    The reason may be a broken installation, for which ops raise OSError instead of using another backend.
    """
    report = {}
    for name in BACKENDS:
        try:
            reason = unavailable(name)
        except OSError as error:
            reason = str(error)
        report[name] = reason or "available: " + ", ".join(sorted(kernels_of(name)))
    return report
