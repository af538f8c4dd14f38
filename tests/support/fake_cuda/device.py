"""Starts the fake device in this process and controls it: schedules, memory, failing calls.

It uses only the standard library, because it must run before torch is imported.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER_VARIABLE = "FAKE_CUDA_FOLDER"
"""Folder of the compiled libraries; if it is not set, `build` finds or makes them."""

SCHEDULES = ("eager", "lazy", "random:1")
"""eager: a stream runs immediately.   lazy: a stream runs only as far as something waits for it.   random:SEED: at each
wait, steps that the events permit run in random order."""

_active: FakeDevice | None = None


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
def _translate(ptx: bytes, path: int, capacity: int) -> int:
    """Translate a module of PTX text (Triton's) for the driver; plugin.h has the contract."""
    from .build import module_library  # imports torch

    try:
        library = os.fsencode(module_library(ptx.decode(), Path(os.environ[FOLDER_VARIABLE])))
    except RuntimeError as reason:
        sys.stderr.write(f"fake_cuda: {reason}\n")
        return 1
    ctypes.memmove(path, library + b"\0", min(len(library) + 1, capacity))
    return 0


class FakeDevice:
    """Control of the devices of this process. All settings apply to all devices."""

    def __init__(self, driver: ctypes.CDLL, runtime: ctypes.CDLL) -> None:
        self._driver, self._runtime = driver, runtime
        driver.fake_cuda_calls.restype = ctypes.c_char_p
        driver.fake_cuda_allocated.restype = ctypes.c_ulonglong
        driver.fake_cuda_set_memory.argtypes = (ctypes.c_ulonglong, ctypes.c_ulonglong)
        driver.fake_cuda_set_translator(_translate)

    def set_schedule(self, schedule: str) -> None:
        """Set one of SCHEDULES, with any seed, after all queued work has run."""
        if self._driver.fake_cuda_set_schedule(schedule.encode()) != 0:
            raise ValueError(f"set_schedule: schedule must be eager, lazy or random:SEED, got {schedule!r}")

    @contextmanager
    def memory(self, device_bytes: int, managed_bytes: int) -> Iterator[None]:
        """Limit each device's own memory and managed memory inside the block."""
        self._driver.fake_cuda_set_memory(device_bytes, managed_bytes)
        try:
            yield
        finally:
            self._driver.fake_cuda_set_memory(16 << 30, 64 << 30)

    @contextmanager
    def launches_ignored(self) -> Iterator[None]:
        """Let launches inside the block succeed without running a kernel, so that only host time is left."""
        self._driver.fake_cuda_ignore_launches(1)
        try:
            yield
        finally:
            self._driver.fake_cuda_ignore_launches(0)

    def allocated(self) -> int:
        """Return the bytes of live device and managed memory, in pages."""
        return int(self._driver.fake_cuda_allocated())

    @contextmanager
    def failing(self, error: int, *, caller: str = "", call: str = "", after: int = 0) -> Iterator[None]:
        """Make one runtime call inside the block return `error`, a cudaError_t.

        caller: part of the path of the calling library.   call: its name.   after: number of successful calls before
        it.   "" matches any.
        """
        self._driver.fake_cuda_fail(caller.encode(), call.encode(), after, error)
        try:
            yield
        finally:
            self._driver.fake_cuda_clear_failure()

    def failed(self) -> bool:
        """Whether the failure of the innermost `failing` has occurred; valid inside the block."""
        return bool(self._driver.fake_cuda_failed())

    @contextmanager
    def recorded_calls(self, caller: str = "") -> Iterator[list[str]]:
        """Record the names of the runtime calls inside the block, of one library as in `failing`; complete at its
        end."""
        calls: list[str] = []
        self._driver.fake_cuda_clear_calls()
        yield calls
        lines = self._driver.fake_cuda_calls().decode().splitlines()
        calls += [name for name, _, path in (line.partition(" ") for line in lines) if caller in path]

    def pending_error(self) -> int:
        """Return the error that the thread's next cudaGetLastError would report."""
        return int(self._runtime.cudaPeekAtLastError())

    def load_module(self, image: bytes) -> int:
        """Return the driver's result of loading a module: PTX text or any other image."""
        module = ctypes.c_void_p()
        return int(self._driver.cuModuleLoadData(ctypes.byref(module), image))

    def launch_host_function(self, stream: int, function: object) -> None:
        """Enqueue a ctypes function of one void* on a stream, or add it to the graph that the stream is captured
        into."""
        code = self._driver.cuLaunchHostFunc(ctypes.c_void_p(stream), function, None)
        if code != 0:
            raise RuntimeError(f"cuLaunchHostFunc: error {code}")


def activate(devices: int = 1, *, capability: str = "8.0", driver_version: int = 13000, log: str = "") -> FakeDevice:
    """Load the fake runtime and driver, which torch, imported later, uses because their names are already loaded.

    driver_version: version that the driver reports, 12080 for CUDA 12.8.   log: file for the runtime's calls, "-" for
    stderr.
    Raises RuntimeError if torch is already imported.
    """
    global _active
    if "torch" in sys.modules:
        raise RuntimeError("activate: torch must not be imported yet; call activate() first")
    folder = Path(os.environ.get(FOLDER_VARIABLE) or _built_folder())
    os.environ.update(
        {
            FOLDER_VARIABLE: str(folder),
            "FAKE_CUDA_DEVICES": str(devices),
            "FAKE_CUDA_CAPABILITY": capability,
            "FAKE_CUDA_DRIVER_VERSION": str(driver_version),
            "FAKE_CUDA_KERNELS": str(folder / "libkernels.so"),
            "FAKE_CUDA_LOG": log,
            # Settings of Triton: its assembler, the driver it links to, and a cache without kernels of a real GPU.
            "TRITON_PTXAS_PATH": str(Path(__file__).with_name("ptxas")),
            "TRITON_LIBCUDA_PATH": str(folder),
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(folder.parent / "triton")),
        }
    )
    # torch's libraries find theirs by DT_RPATH before LD_LIBRARY_PATH, but a loaded library with the same SONAME has
    # precedence over both.
    libraries = [ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in ("libcuda.so.1", "libcudart.so.13")]
    _active = FakeDevice(*libraries)
    return _active


def active() -> FakeDevice | None:
    """Return the fake device of this process, or None if torch uses the real machine."""
    return _active


def _built_folder() -> str:
    command = [sys.executable, "-m", "tests.support.fake_cuda.build"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the fake CUDA device does not build:\n{done.stderr}")
    return done.stdout.strip()
