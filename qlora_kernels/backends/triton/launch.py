"""Launches with less host time than Triton's: the compiled kernel is kept by the kinds of the arguments.

At each launch, Triton binds the arguments to names, specializes each of them, formats a key from the result and builds
the metadata for profilers, before it calls the compiled kernel's launcher. Here, this is done once for each kind of
call, and later calls use the compiled kernel's launcher itself, in the way that Triton 3.6 to 3.9 do.

The kind of a call is what Triton specializes on: for pointers the dtype and whether the address is a multiple of 16;
for integers whether the value is 1, whether it is a multiple of 16, and its width; all constexprs and options by value.

A launcher that runs in every layer keeps a Launch for each size of its problem, with everything but the pointers:

    kernel[grid](*pointers, *numbers, **flags)                                launches
    launch = kernel.prepare(grid, numbers, **flags); launch(*pointers)        the same, the first part once

launch_sequence.py does the rest once for all launches of a call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from operator import attrgetter, or_
from types import ModuleType
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TESTED_VERSIONS = ((3, 6), (3, 7), (3, 8), (3, 9))
"""Versions of Triton whose compiled kernels are called directly; with others, Triton itself launches."""

DIRECT_VERSIONS = ((3, 7), (3, 8), (3, 9))
"""Those whose C launcher is called without CudaLauncher, which costs a microsecond or two."""

FP_FUSION = True
"""Whether kernels may fuse a product and a sum to one FMA, unless their launcher states it. Without this flag, the
environment variable TRITON_DEFAULT_FP_FUSION and the version of Triton decide: 3.10 changes the default to False.
"""

KEPT_LAUNCHES = 4096
"""Number of sizes for which a launcher keeps its Launch."""


address_of, _dtype_of = Tensor.data_ptr, attrgetter("dtype")


def _version() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])


class _Compiled(NamedTuple):
    """What a launch needs of a compiled kernel: run(x, y, z, stream, *head, arguments) launches it on a grid.

    constants: the constexprs, the last of the arguments.   kernel: keeps the loaded module alive.
    """

    run: Callable[..., None]
    head: tuple[Any, ...]
    constants: tuple[Any, ...]
    kernel: Any


def _launcher_of(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...]] | None:
    """Return `run` and `head` of a kernel that is compiled for an NVIDIA GPU, None for any other.

    Triton 3.7 to 3.9 allocate scratch memory around their C launcher, which is called directly for a kernel without.
    """
    run: Any = getattr(compiled, "run", None)
    if type(run).__name__ != "CudaLauncher":
        return None
    scratch = (getattr(run, "global_scratch_size", 1), getattr(run, "profile_scratch_size", 1))
    if _version() in DIRECT_VERSIONS and scratch == (0, 0) and not getattr(run, "gsan_enabled", False):
        options = (run.launch_cooperative_grid, run.launch_pdl)
        of_call = (run.arg_annotations, run.kernel_signature)
        return run.launch, (compiled.function, *options, compiled.packed_metadata, *(None,) * 5, *of_call)

    def by_launcher(x: int, y: int, z: int, stream: int, *head_and_arguments: Any) -> None:
        *head, arguments = head_and_arguments
        run(x, y, z, stream, *head, *arguments)

    return by_launcher, (compiled.function, compiled.packed_metadata, None, None, None)


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
        self.may_keep = isinstance(kernel, JITFunction) and _version() in TESTED_VERSIONS
        self._has_settled_key = not isinstance(kernel, JITFunction)
        self.kept: dict[tuple[Any, ...], _Compiled] = {}
        """Kind of a call -> the compiled kernel."""

    def settle_cache_key(self) -> None:
        """Make the key of this kernel in Triton's cache independent of the kernels that the process launched before."""
        if not self._has_settled_key:
            _settle_cache_key(self.kernel)
            self._has_settled_key = True

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **flags: Any) -> None:
        Launch(self, grid, args[self._pointers :], flags)(*args[: self._pointers])

    def prepare(self, grid: tuple[int, ...], numbers: tuple[Any, ...], **flags: Any) -> Launch:
        """Return a launch to be called with the pointers. numbers: the arguments that follow them.   flags: constexprs
        and options.
        """
        return Launch(self, grid, numbers, flags)


class Kept(NamedTuple):
    """A compiled kernel, and the arguments of a Launch that follow the pointers."""

    compiled: _Compiled
    rest: tuple[Any, ...]


class Launch:
    """A launch of a kernel with all arguments but the pointers, which are those of the call.

    The first pointer's device must be the current one.
    """

    __slots__ = ("_flags", "_grid", "_kept", "_kernel", "_numbers", "grid")

    def __init__(
        self, kernel: Launchable, grid: tuple[int, ...], numbers: tuple[Any, ...], flags: dict[str, Any]
    ) -> None:
        kernel.settle_cache_key()
        self._kernel, self._grid, self._numbers = kernel, grid, numbers
        self._flags = {"enable_fp_fusion": FP_FUSION, **flags}
        self.grid = (*grid, 1, 1)[:3]
        self._kept: dict[tuple[Any, ...], Kept] = {}
        """Kind of the pointers -> what launches them."""

    def __call__(self, *pointers: Tensor) -> None:
        kernel = self._kernel
        if not kernel.may_keep or kernel.kernel.pre_run_hooks or is_observed():
            kernel.kernel[self._grid](*pointers, *self._numbers, **self._flags)
            return
        addresses = [*map(address_of, pointers)]
        kind = kind_of(addresses, pointers[0].get_device(), pointers)
        kept = self._kept.get(kind)
        if kept is None:
            self._launch_and_keep(kind, pointers)
            return
        compiled, rest = kept
        compiled.run(*self.grid, current_stream(kind[0]), *compiled.head, (*addresses, *rest))

    @property
    def hooks(self) -> Sequence[Any]:
        """Functions that Triton calls before each launch of the kernel; a list that may grow."""
        return getattr(self._kernel.kernel, "pre_run_hooks", ())

    def kept_for(self, pointers: Sequence[Tensor]) -> Kept | None:
        """Return what launches these pointers without Triton, None where Triton itself has to launch them."""
        if not self._kernel.may_keep or self._kernel.kernel.pre_run_hooks or is_observed():
            return None
        addresses = [*map(address_of, pointers)]
        return self._kept.get(kind_of(addresses, pointers[0].get_device(), pointers))

    def _launch_and_keep(self, kind: tuple[Any, ...], pointers: tuple[Tensor, ...]) -> None:
        """Launch by Triton, unless another Launch has kept this kind, and keep the kernel if it is one of a GPU."""
        kernel, kept = self._kernel, self._kernel.kept
        whole_kind = (*kind, *map(_kind_of_number, self._numbers), *self._flags.items())
        launches_again = whole_kind in kept
        if not launches_again:
            compiled = kernel.kernel[self._grid](*pointers, *self._numbers, **self._flags)
            launcher = _launcher_of(compiled)
            constants = kernel.kernel.arg_names[len(pointers) + len(self._numbers) :]
            if launcher is None or not all(name in self._flags for name in constants):
                return
            kept[whole_kind] = _Compiled(*launcher, tuple(self._flags[name] for name in constants), compiled)
        self._kept[kind] = Kept(kept[whole_kind], (*self._numbers, *kept[whole_kind].constants))
        if launches_again:
            self(*pointers)


def kind_of(addresses: Sequence[int], device: int, typed: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the kind of pointers, which begins with the device. typed: those whose dtypes may differ from call to
    call.
    """
    # Most often all are multiples of 16, which one number shows.
    aligned = reduce(or_, addresses) & 15 == 0 or tuple(address & 15 == 0 for address in addresses)
    return device, aligned, *map(_dtype_of, typed)


def current_stream(device: int) -> int:
    """Return the stream on which torch launches on this device."""
    stream: int = driver.active.get_current_stream(device)
    return stream


def launchable(kernel: Any) -> Launchable:
    """Decorate a function that is already decorated by triton.jit."""
    return Launchable(kernel)


def _settle_cache_key(function: Any) -> None:
    """Compute the cache key of a function after the keys of the functions that it calls.

    In Triton 3.6 and 3.7, a key contains the global constants of a called function only if the key of that function was
    computed before, for another kernel. A kernel would then be compiled again in a process that launches its kernels in
    another order.
    """
    for called in called_functions(function):
        if called.hash is None:
            _settle_cache_key(called)
    _ = function.cache_key


def called_functions(function: Any) -> list[Any]:
    """Return the functions of triton.jit that the source of one names, by themselves or as attributes of a module."""
    names, scope = function.fn.__code__.co_names, function.fn.__globals__
    modules = [scope[name] for name in names if isinstance(scope.get(name), ModuleType)]
    named = (scope.get(name) for name in names)
    attributes = (getattr(module, name, None) for module in modules for name in names)
    return [value for value in (*named, *attributes) if isinstance(value, JITFunction)]


@lru_cache(maxsize=4096, typed=True)
def _kind_of_number(value: float) -> tuple[Any, ...]:
    """Return what Triton specializes on of a number."""
    if type(value) is int:
        return (value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63)
    return (type(value),)


def is_observed() -> bool:
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
