"""Workers: the processes of a data-parallel run, each with a part of every batch and the whole model or a part of it.

Gradients, losses and counts are summed, so that every process computes the result of one process with the whole batch.
If a process dies or does not answer in time, the others end with an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .lost_workers import AnsweringThread, ignore_sigterm, is_failed_collective, lost_ranks

T = TypeVar("T")

_GRACE = 10.0
"""Seconds in which the other processes have to answer after a collective has failed."""


class LostWorkerError(RuntimeError):
    """Another process died or does not answer."""


@dataclass(frozen=True)
class Workers:
    """The processes of a data-parallel run. The default is one process, which sends nothing.

    rank: number of this process.   world: number of processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Workers:
        """Return the processes of torch's default process group, or one process if there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of `items`, which may be empty."""
        return items if self.world == 1 else items[self.rank :: self.world]

    def total(self, number: float) -> float:
        """Return the sum over all processes, in fp64 and equal in each."""
        if self.world == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64)
        self._run(lambda: dist.all_reduce(value))
        return value.item()

    def gathered(self, items: T) -> list[T]:
        """Return the `items` of every process, in the order of ranks."""
        if self.world == 1:
            return [items]
        gathered: list[Any] = [None] * self.world
        self._run(lambda: dist.all_gather_object(gathered, items))
        return gathered

    def all_or_none(self, compute: Callable[[], T]) -> T:
        """Return compute(), which every process calls. If its input is bad in one process, all of them raise."""
        result: list[T] = []
        error: Exception | None = None
        try:
            result.append(compute())
        except (ValueError, TypeError, NotImplementedError, OSError) as caught:
            error = caught
        failed = [message for message in self.gathered(None if error is None else str(error)) if message is not None]
        if error is not None:
            raise error
        if failed:
            raise ValueError(failed[0])
        return result[0]

    def wait(self) -> None:
        """Return when every process has called this method."""
        self.gathered(None)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes; a missing gradient counts as zero."""
        if self.world == 1:
            return
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._each_dtype([p.grad for p in parameters if p.grad is not None], dist.all_reduce)

    def start_alike(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy rank 0's values of the parameters to every process."""
        if self.world > 1:
            self._each_dtype([p.detach() for p in parameters], lambda flat: dist.broadcast(flat, src=0))

    def seed(self, seed: int, step: int) -> None:
        """Seed dropout with a function of seed, step and rank, so that masks differ between processes."""
        if self.world > 1:
            torch.manual_seed(((seed << 20) + step * self.world + self.rank) % (1 << 63))

    def _each_dtype(self, tensors: list[Tensor], collective: Callable[[Tensor], object]) -> None:
        """Call the collective once for all tensors of each dtype."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            self._run(lambda flat=flat: collective(flat))  # type: ignore[misc]
            for tensor, part in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _run(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise self._lost(error) from error

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Convert the error of a failed collective inside, such as one of FSDP2, to a LostWorkerError.

        Raises LostWorkerError instead of the RuntimeError of a failed collective, and instead of the SystemExit of a
        SIGTERM that arrived while such an error was handled.
        """
        try:
            yield
        except (RuntimeError, SystemExit) as error:
            failure = _failure(error) if self.world > 1 else None
            if failure is None:
                raise
            ignore_sigterm()
            if isinstance(failure, LostWorkerError):
                raise failure from failure.__cause__
            raise self._lost(failure) from failure

    def _lost(self, error: RuntimeError) -> LostWorkerError:
        """Return the error that names the lost processes, after a collective has failed with `error`."""
        ignore_sigterm()
        try:
            lost = lost_ranks(_store(), self.rank, self.world, _GRACE)
        except RuntimeError:  # the process with the store is lost
            lost = [0]
        names = ", ".join(f"rank {rank}" for rank in lost) or "a process"
        reason = " ".join(str(error).split())[:200]
        return LostWorkerError(f"{names} of {self.world} must answer, got none; the run stops ({reason})")


@contextmanager
def joined(environment: dict[str, str], timeout: timedelta, device: torch.device | None = None) -> Iterator[Workers]:
    """Yield the workers of the process group that torchrun or accelerate launch describes; it is destroyed at the end.

    device: of this process's gradients. Those on a CUDA device are summed by NCCL, everything else by gloo.
    An existing process group is used and kept. If another process is lost, this one ignores SIGTERM from then on, so
    that it can report the LostWorkerError and end: a launcher sends SIGTERM to all processes once one has died.
    """
    joins = dist.is_available() and not dist.is_initialized() and int(environment.get("WORLD_SIZE", "1")) > 1
    if joins:
        on_cuda = device is not None and device.type == "cuda" and dist.is_nccl_available()
        if on_cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timeout)
    try:
        workers = Workers.current()
        answering = AnsweringThread(_store(), workers.rank) if workers.world > 1 else nullcontext()
        with workers.naming_the_lost(), answering:
            yield workers
    finally:
        if joins:
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _failure(error: BaseException | None) -> RuntimeError | None:
    """Return the LostWorkerError or the error of a failed collective that `error` is or was raised in handling of."""
    while error is not None:
        if isinstance(error, RuntimeError) and (isinstance(error, LostWorkerError) or is_failed_collective(error)):
            return error
        error = error.__context__
    return None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


ONE_PROCESS = Workers()
"""The workers of a run with only this process."""
