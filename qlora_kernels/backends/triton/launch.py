"""Launches with less host time than Triton's: the compiled kernel is kept by the kinds of the arguments.

At each launch, Triton binds the arguments to names, specializes each of them, formats a key from the result and builds
the metadata for profilers, before it calls the compiled kernel's launcher. `launchable` does this once for each kind of
call, and later calls the launcher itself, in the way that Triton 3.6 to 3.8 do.

The kind of a call is what Triton specializes on: for pointers the dtype and whether the address is a multiple of 16;
for integers whether the value is 1, whether it is a multiple of 16, and its width; all constexprs and options by value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TESTED_VERSIONS = ((3, 6), (3, 7), (3, 8))
"""Versions of Triton whose compiled kernels are called directly; with others, Triton itself launches."""


def _version() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])


class _Compiled(NamedTuple):
    """What a launch needs of a compiled kernel. kernel: keeps the loaded module alive.   constants: the constexprs."""

    run: Callable[..., None]
    function: int
    packed_metadata: Any
    constants: tuple[Any, ...]
    kernel: Any


class Launchable:
    """A kernel whose parameters are pointers named p_*, then numbers, then constexprs; kernel[grid](...) launches it.

    kernel: from triton.jit, or the interpreter's function.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.fn = kernel.fn
        self.__doc__ = kernel.fn.__doc__
        names: Sequence[str] = kernel.arg_names
        self._pointers = sum(name.startswith("p_") for name in names)
        assert all(name.startswith("p_") for name in names[: self._pointers])
        self._may_keep = isinstance(kernel, JITFunction) and _version() in TESTED_VERSIONS
        self._kept: dict[tuple[Any, ...], _Compiled] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **flags: Any) -> Any:
        if not self._may_keep or self.kernel.pre_run_hooks or _is_observed():
            return self.kernel[grid](*args, **flags)
        pointers, numbers = args[: self._pointers], args[self._pointers :]
        addresses = [pointer.data_ptr() for pointer in pointers]
        active = driver.active
        device = active.get_current_device()
        kind = (
            device,
            *[(pointer.dtype, pointer.get_device()) for pointer in pointers],
            *[address % 16 == 0 for address in addresses],
            *map(_kind_of_number, numbers),
            *flags.items(),
        )
        kept = self._kept.get(kind)
        if kept is None:
            return self._launch_and_keep(kind, grid, args, flags)
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        kept.run(x, y, z, stream, kept.function, kept.packed_metadata, None, None, None, *addresses, *numbers,
                 *kept.constants)  # fmt: skip
        return kept.kernel

    def _launch_and_keep(
        self, kind: tuple[Any, ...], grid: tuple[int, ...], args: tuple[Any, ...], flags: dict[str, Any]
    ) -> Any:
        """Launch by Triton, and keep the compiled kernel if it is one of an NVIDIA GPU."""
        compiled = self.kernel[grid](*args, **flags)
        run: Any = getattr(compiled, "run", None)
        constants = self.kernel.arg_names[len(args) :]
        if type(run).__name__ == "CudaLauncher" and all(name in flags for name in constants):
            self._kept[kind] = _Compiled(
                run, compiled.function, compiled.packed_metadata, tuple(flags[name] for name in constants), compiled
            )
        return compiled


def launchable(kernel: Any) -> Launchable:
    """Decorate a function that is already decorated by triton.jit."""
    return Launchable(kernel)


@lru_cache(maxsize=4096, typed=True)
def _kind_of_number(value: float) -> tuple[Any, ...]:
    """Return what Triton specializes on of a number."""
    if type(value) is int:
        return (value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63)
    return (type(value),)


def _is_observed() -> bool:
    """Whether a profiler or a tool wants to see launches, or has replaced Triton's launch."""
    runtime = triton.knobs.runtime
    return (
        JITFunction.run.__module__ != JITFunction.__module__
        or runtime.add_stages_inspection_hook is not None
        or _has_calls(runtime.launch_enter_hook)
        or _has_calls(runtime.launch_exit_hook)
    )


def _has_calls(hook: Any) -> bool:
    """Whether a hook, a chain of functions or one function, does anything."""
    return hook is not None and bool(getattr(hook, "calls", True))
