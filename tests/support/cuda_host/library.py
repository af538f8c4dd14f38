"""A built library in a separate worker process, in which sanitizers are preloaded and a crash becomes a report."""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ptx.parser import Parameter
from .toolchain import fixed_addresses, sanitizer_library

ORDERS = ("random", "uniform", "warp-priority", "forward", "reverse")
"""The order in which ready threads run; "random" draws "uniform" or "warp-priority" for each block."""

_WORKER = Path(__file__).with_name("worker.py")
_LIMIT_SECONDS = 240


class KernelFault(RuntimeError):
    """An error of the emulator: barrier divergence, deadlock, bad address, bad launch, or an overwritten guard byte."""


class SanitizerReport(RuntimeError):
    """The worker died; the message is a sanitizer's report or describes a crash."""


@dataclass(frozen=True)
class out:
    """An argument that the call may write. All other tensors must be unchanged afterwards."""

    tensor: Tensor


@dataclass(frozen=True)
class shifted:
    """An address inside the memory of a tensor, `nbytes` after its begin, in a `struct_of`: of a view, for example."""

    argument: Tensor | out
    nbytes: int


@dataclass(frozen=True)
class pointers:
    """A device array of 64-bit words: addresses of tensors and `out` tensors, numbers, 0 for None."""

    items: tuple[Tensor | out | int | None, ...]


@dataclass(frozen=True)
class struct_of:
    """A struct in host memory, passed by its address, as the launchers' arguments are.

    format: of its members in order, as in Python's `struct` module with native sizes and alignment: P for a pointer,
        q int64, i int, f float, d double, "0q" for the padding at the end of a nested struct.
    items: one for each member; tensors, `out`, `shifted`, `pointers` and None for pointers.
    """

    format: str
    items: tuple[Any, ...]


@dataclass(frozen=True)
class BankCount:
    """Accesses to shared memory by one PTX instruction.

    line: in the PTX file.   instructions: executions by warps.   wavefronts: passes through the 32 banks they take.
    needed: the same if no two words of one bank were accessed in one pass.
    """

    line: int
    instructions: int
    wavefronts: int
    needed: int


@dataclass(frozen=True)
class RuntimeCall:
    """One recorded call of the CUDA runtime, or a "launch" with the kernel's name, and its integers from the log."""

    name: str
    text: str
    values: tuple[int, ...]


class Worker:
    """The process of worker.py, connected by a pipe; started at the first request and after a crash."""

    def __init__(self, library: Path, sanitizer: str) -> None:
        self._library, self._sanitizer = library, sanitizer
        self._process: subprocess.Popen[bytes] | None = None

    def request(self, **message: Any) -> Any:
        """Send one message and wait for its answer."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        signal.signal(signal.SIGALRM, _on_alarm)
        signal.alarm(_LIMIT_SECONDS)
        try:
            payload = pickle.dumps(message)
            process.stdin.write(struct.pack("<Q", len(payload)) + payload)
            process.stdin.flush()
            header = process.stdout.read(8)
            answer = process.stdout.read(struct.unpack("<Q", header)[0]) if len(header) == 8 else b""
        except BrokenPipeError:
            answer = b""
        except TimeoutError:
            process.kill()
            raise
        finally:
            signal.alarm(0)
        if not answer:
            raise SanitizerReport(self._post_mortem())
        return pickle.loads(answer)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **_sanitizer_environment(self._sanitizer)}
        prefix = fixed_addresses() if self._sanitizer == "tsan" else ()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-I", "-S", str(_WORKER), str(self._library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
        )
        return self._process

    def _post_mortem(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._process = None
        self._stderr.seek(0)
        text = self._stderr.read().decode(errors="replace").strip()
        return text or f"the worker ended with code {code}"

    def __del__(self) -> None:
        self.close()


class Library:
    """Compiled sources. Each call runs the launcher's host code, and its kernels run on emulated threads."""

    def __init__(self, path: Path, sanitizer: str) -> None:
        self.path = path
        self._worker = Worker(path, sanitizer)

    def call(self, name: str, *arguments: Any, seed: int = 1, order: str = "random", error: str = "raise") -> int:
        """Call `extern "C"` function `name` and return its result (a cudaError_t for launchers).

        arguments: a tensor (copied to memory of its exact size with guarded ends) or None for a pointer, `out(tensor)`
        for one that is written, `pointers(...)`, `struct_of(...)`, int for any integer, float for a float, bytes for
        a struct's memory.
        seed, order: the schedule.   error: "return" gives back the code of a failed launch instead of raising.
        Raises KernelFault or SanitizerReport.
        """
        flat: list[Tensor] = []
        writable: list[bool] = []

        def encode(argument: Any) -> Any:
            if isinstance(argument, struct_of):
                return ("struct", (argument.format, [encode(item) for item in argument.items]))
            if isinstance(argument, pointers):
                return ("table", [encode(item) for item in argument.items])
            if isinstance(argument, shifted):
                return ("shifted", (encode(argument.argument)[1], argument.nbytes))
            tensor = argument.tensor if isinstance(argument, out) else argument
            if isinstance(tensor, Tensor):
                for index, known in enumerate(flat):
                    if known is tensor:  # equal tensors share memory
                        writable[index] |= isinstance(argument, out)
                        return ("memory", index)
                flat.append(tensor)
                writable.append(isinstance(argument, out))
                return ("memory", len(flat) - 1)
            return ("value", argument)

        encoded = [encode(argument) for argument in arguments]
        before = [_bytes(tensor) for tensor in flat]
        answer = self._worker.request(
            action="call", name=name, arguments=encoded, memory=before, seed=seed, order=ORDERS.index(order)
        )
        for index, (tensor, old, new) in enumerate(zip(flat, before, answer["memory"], strict=True)):
            if writable[index]:
                _assign(tensor, new)
            elif old != new:
                raise KernelFault(f"{name}: an input of shape {tuple(tensor.shape)} was written")
        if answer["error"] and error == "raise":
            raise KernelFault(answer["error"])
        result: int = answer["result"]
        return result

    def calls(self, clear: bool = True) -> list[RuntimeCall]:
        """Return the recorded runtime calls and launches."""
        records = []
        for line in self._worker.request(action="log", clear=clear):
            name, *rest = line.split(" ")
            text = rest.pop(0) if rest and not rest[0].lstrip("-").isdigit() else ""
            records.append(RuntimeCall(name, text, tuple(map(int, rest))))
        return records

    def fail(self, call: str, error: int, after: int = 0) -> None:
        """Make runtime function `call` (or "launch") return `error` once, after `after` successful calls."""
        self._worker.request(action="fail", call=call, error=error, after=after)

    def set_attribute(self, attribute: int, value: int) -> None:
        """Set the result of cudaDeviceGetAttribute for later calls."""
        self._worker.request(action="attribute", attribute=attribute, value=value)

    def count_banks(self, enabled: bool = True) -> None:
        """Start to count wavefronts of shared-memory accesses from zero, or stop. Only translated PTX is counted."""
        self._worker.request(action="count_banks", enabled=int(enabled))

    def bank_counts(self) -> list[BankCount]:
        """Return the counts since `count_banks`, by the line of the PTX instruction."""
        return [BankCount(*values) for values in self._worker.request(action="banks")]

    def live_allocations(self) -> int:
        """Return the number of allocations by launchers that are not freed."""
        count: int = self._worker.request(action="live")
        return count

    def close(self) -> None:
        """End the worker process."""
        self._worker.close()


class Module(Library):
    """Translated PTX. unsupported: opcodes that fail if they are executed, with their counts."""

    def __init__(
        self, path: Path, sanitizer: str, parameters: dict[str, list[Parameter]], unsupported: Counter[str]
    ) -> None:
        super().__init__(path, sanitizer)
        self.parameters = parameters
        self.unsupported = unsupported

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        args: Sequence[Any],
        *,
        seed: int = 1,
        order: str = "random",
    ) -> None:
        """Run one kernel by its name in the PTX.

        grid, block: up to three sizes.   shared: bytes of dynamic shared memory.
        args: one for each parameter, as in `Library.call`; ints and floats take the width that the PTX declares,
        bytes fill a struct passed by value. Missing trailing pointers (Triton's scratch) are null.
        Raises KernelFault or SanitizerReport.
        """
        declared = self.parameters[kernel]
        values = [*args, *[None] * (len(declared) - len(args))]
        packed = [(p.offset, p.bytes, p.kind, value) for p, value in zip(declared, values, strict=True)]
        sizes = [tuple(s) + (1,) * (3 - len(tuple(s))) for s in (grid, block)]
        layout = [(offset, size, kind) for offset, size, kind, _ in packed]
        result = self.call(
            "cuda_host_launch_ptx",
            ("ptx", kernel, *sizes, shared, layout),
            *[value for *_, value in packed],
            seed=seed,
            order=order,
        )
        if result != 0:
            raise KernelFault(f"{kernel}: launch returned {result}")


def _on_alarm(signum: int, frame: object) -> None:
    raise TimeoutError(f"an emulated call took more than {_LIMIT_SECONDS} s")


def _sanitizer_environment(sanitizer: str) -> dict[str, str]:
    if sanitizer == "asan":
        # libstdc++ is loaded after libasan; otherwise the first C++ exception crashes in AddressSanitizer.
        preload = [sanitizer_library(name) for name in ("asan", "ubsan", "stdc++")]
        options = "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=1:abort_on_error=0"
        return {"LD_PRELOAD": ":".join(preload), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}
    if sanitizer == "tsan":
        return {"LD_PRELOAD": sanitizer_library("tsan"), "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0"}
    return {}


def _bytes(tensor: Tensor) -> bytes:
    if not tensor.is_contiguous():
        raise ValueError(f"an argument must be contiguous, got strides {tensor.stride()}")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def _assign(tensor: Tensor, content: bytes) -> None:
    if content:
        new = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        tensor.detach().reshape(-1).view(torch.uint8).copy_(new)
