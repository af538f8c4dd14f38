"""Simulate a second device in Python: its tensors keep their values in CPU memory but do not mix with CPU tensors.

The device is torch's PrivateUse1 backend, implemented for every operator of every namespace, including the package's
ops: the tensors are unwrapped, the operator runs on the CPU, and the results are wrapped. An operator that gets tensors
of both devices raises, as on a GPU, except where torch permits a CPU tensor: copies, indices, zero-dimensional scalars.
Autograd, modules and optimizers run unchanged on it. `install` affects the whole process, so use a separate process.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

NAME = "simulated"
CALLS: Counter[str] = Counter()
"""Operator name -> number of times that it ran on the device."""

_TAKE_BOTH = {"aten::_to_copy", "aten::copy_", "aten::index.Tensor", "aten::index_put_"}
_kept: list[Any] = []


class OnDevice(torch.Tensor):
    """A tensor on the simulated device.   held: CPU tensor with its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        wrapper.held = held
        return wrapper

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    def tolist(self) -> Any:
        """Return the values as a list; torch does not support tolist for such subclasses."""
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Raise TypeError, as for tensors on a GPU."""
        raise TypeError(f"can't convert {self.device} tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def install() -> torch.device:
    """Register the device with torch, and return it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    _kept.append(library)
    of_data = torch.tensor
    _device_constructors()  # torch keeps this list of the factories that `with torch.device()` acts on: with its own

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        """Replace torch.tensor, which cannot create a tensor on a device implemented in Python."""
        if device is None or torch.device(device).type != NAME:
            return of_data(data, device=device, **options)
        return of_data(data, device="cpu", **options).to(device)

    torch.tensor = tensor
    return torch.device(NAME, 0)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
    strays = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
    if strays and len(strays) < len(tensors) and name not in _TAKE_BOTH:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, got {NAME}:0 and a CPU tensor of shape "
            f"{tuple(strays[0].shape)}"
        )
    CALLS[name] += 1
    device = kwargs.get("device")
    to_device = device.type == NAME if device is not None else any(isinstance(t, OnDevice) for t in tensors)
    if name == "aten::copy_":
        to_device = isinstance(args[0], OnDevice)
    inner = {**kwargs, "device": torch.device("cpu")} if device is not None else kwargs
    out = func(*tree_map(_held, args), **tree_map(_held, inner))
    if not to_device:
        return args[0] if name == "aten::copy_" else out
    out = tree_map(lambda value: OnDevice(value) if type(value) is torch.Tensor else value, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value
