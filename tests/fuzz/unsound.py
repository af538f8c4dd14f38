"""Unsound replacements of arguments: every kind of tensor that torch has, and numbers at the ends of ranges."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

NUMBERS = (0, -1, 1, 3, 31, 33, 64, 2**16, 2**31 - 1, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, -(2**63))
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1.0 - 2**-18, 1.0, 2.0, 1e308)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool, torch.complex64)


class Wrapper(torch.Tensor):
    """A tensor whose data is elsewhere."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        return func(*unwrapped, **(kwargs or {}))


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


def misaligned(t: Tensor) -> Tensor:
    data = bytearray(t.numel() * t.element_size() + 16)
    return torch.frombuffer(data, dtype=t.dtype, count=max(t.numel(), 1), offset=1)[: t.numel()].view(t.shape)


def fake(t: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(t)


@cache
def mesh() -> Any:
    from torch.distributed import init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


def distributed(t: Tensor) -> Tensor:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    return distribute_tensor(t, mesh(), [Shard(0) if t.dim() else Replicate()])


TENSORS: tuple[Callable[[Tensor, random.Random], Any], ...] = (
    lambda t, rng: freed(t),
    lambda t, rng: freed(t)[1:] if t.dim() else freed(t),
    lambda t, rng: shrunk(t),
    lambda t, rng: misaligned(t),
    lambda t, rng: torch.zeros((), dtype=t.dtype).expand(t.shape),
    lambda t, rng: torch.zeros(1, dtype=t.dtype).expand(2**40),
    lambda t, rng: torch.zeros(64, dtype=t.dtype).as_strided((2**20, 32), (0, 1)),
    lambda t, rng: torch.zeros(t.numel() + 64, dtype=t.dtype).unfold(0, 8, 1),
    lambda t, rng: torch.stack([t, t], dim=-1)[..., 0],
    lambda t, rng: t.transpose(0, -1) if t.dim() else t,
    lambda t, rng: t.flatten()[: rng.randrange(t.numel() + 1)],
    lambda t, rng: t.flatten(),
    lambda t, rng: t[None],
    lambda t, rng: t.to(rng.choice(DTYPES)),
    lambda t, rng: t.to(rng.choice(DTYPES)).clone(),
    lambda t, rng: t.new_empty(0),
    lambda t, rng: t.new_empty((0, *t.shape)),
    lambda t, rng: t.new_zeros(()),
    lambda t, rng: torch.empty(t.shape, dtype=t.dtype, device="meta"),
    lambda t, rng: t.to_sparse(),
    lambda t, rng: t.reshape(1, -1).to_sparse_csr(),
    lambda t, rng: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    lambda t, rng: t.float().to_mkldnn(),
    lambda t, rng: torch.nested.nested_tensor([t, t]),
    lambda t, rng: torch._neg_view(t.clone()),
    lambda t, rng: torch.complex(t.float(), t.float()).conj(),
    lambda t, rng: torch.complex(t.float(), t.float()).conj().imag,
    lambda t, rng: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    lambda t, rng: fake(t),
    lambda t, rng: Wrapper(t),
    lambda t, rng: distributed(t),
    lambda t, rng: torch.full_like(t, float("nan")) if t.is_floating_point() else torch.full_like(t, -1),
    lambda t, rng: (
        t.clone().random_(-(2**62), 2**62) if t.dtype == torch.int64 else t.clone().view(-1).roll(1).view(t.shape)
    ),
    lambda t, rng: (
        t.clone().index_fill_(0, torch.tensor([0]), rng.choice(NUMBERS)) if t.dtype == torch.int64 and t.dim() else t
    ),
    lambda t, rng: t.clone().requires_grad_(),
    lambda t, rng: torch.nn.Parameter(t.clone(), requires_grad=False),
    lambda t, rng: None,
    lambda t, rng: 3.0,
    lambda t, rng: [t, t],
)


def unsound(value: Any, rng: random.Random) -> Any:
    """Return a replacement of `value`, or `value` itself if torch cannot make it."""
    if isinstance(value, Tensor):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                return rng.choice(TENSORS)(value, rng)
            except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError):
                return value
    if isinstance(value, list):
        changed = list(value)
        kind = rng.randrange(4)
        if kind == 0:
            return changed[:-1]
        if kind == 1:
            return changed + changed
        if kind == 2:
            return []
        if changed:
            place = rng.randrange(len(changed))
            changed[place] = unsound(changed[place], rng)
        return changed
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(NUMBERS)
    if isinstance(value, float):
        return rng.choice(FLOATS)
    if isinstance(value, str):
        return rng.choice(("", "avx2", "portable", "sse", "\0", "x" * 10_000))
    if isinstance(value, torch.dtype):
        return rng.choice(DTYPES)
    return torch.zeros(rng.choice((0, 1, 5))) if rng.random() < 0.5 else None
