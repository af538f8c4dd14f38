"""Compiles Triton kernels for a GPU that is not present, through the launchers that dispatch uses.

A mock driver answers Triton's queries about the current device, and every `kernel[grid](...)` becomes a warm-up: it
specializes on the real arguments (dtypes, divisibility by 16, values equal to one), compiles for the assumed
architecture, records the result and launches nothing. Tensors may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .row import MAX_SHARED


class MockDriver:
    """A driver with the functions that Triton's launcher and compiler use."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """Return the target that kernels are compiled for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Return the architecture as the number of the device."""
        # Caches of compiled kernels are kept by device number: one for each architecture.
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:  # noqa: ARG002
        """Return 0, the default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the device on which launchers find their tensors."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """Return the torch module that stands for the device."""
        return torch

    @staticmethod
    def is_active() -> bool:
        """Return True: this driver is used for every launch."""
        return True

    class utils:
        """The functions with which Triton queries device properties."""

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            """Return the properties of the architecture compiled for."""
            return {
                "max_shared_mem": MAX_SHARED[device],
                "multiprocessor_count": 108,
                "max_num_regs": 65536,
                "warpSize": 32,
            }

    class launcher_cls:
        """The class with which Triton launches a compiled kernel."""

        def __init__(self, *args: Any) -> None:
            pass


@dataclass(frozen=True)
class Compiled:
    """One launch: the kernel's name, its grid, the compiled code, and its arguments by parameter name.

    constants: the launch's keyword arguments, constexprs and options.   arguments: the positional ones.
    """

    name: str
    arch: int
    grid: tuple[int, ...]
    constants: dict[str, Any]
    kernel: Any = field(repr=False)
    arguments: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def runtime_arguments(self) -> dict[str, Any]:
        """Return the parameters of the compiled code, in order; arguments equal to one have become constants."""
        signature = self.kernel.src.signature
        return {name: value for name, value in self.arguments.items() if signature[name] != "constexpr"}


@contextmanager
def compiling_for(arch: int, then: Callable[[Compiled], None] | None = None) -> Iterator[list[Compiled]]:
    """Compile every launch inside the block for sm_<arch>, append it to the list, and pass it to `then`."""
    launches: list[Compiled] = []
    stock_run, stock_driver = JITFunction.run, driver._active

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        kernel = stock_run(self, *args, grid=grid, warmup=True, **kwargs)
        constants = {name: value for name, value in kwargs.items() if isinstance(value, (int, bool, str))}
        arguments = dict(zip(self.arg_names, args, strict=False))
        launch = Compiled(self.__name__, arch, tuple(grid), constants, kernel, arguments)
        launches.append(launch)
        if then is not None:
            then(launch)
        return kernel

    driver.set_active(MockDriver(arch))
    JITFunction.run = warm_up
    try:
        yield launches
    finally:
        JITFunction.run = stock_run
        driver._active = stock_driver
