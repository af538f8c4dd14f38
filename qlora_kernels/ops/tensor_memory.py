"""Checks that refuse tensors whose storage was freed, before torch or a kernel accesses them.

torch accesses a tensor's memory without checking that its storage still exists, and the process ends with a
segmentation fault. FSDP frees parameters in this way, by untyped_storage().resize_(0). The native libraries check their
arguments (csrc/bindings/arguments.h); this module checks the arguments of torch's ops.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter


def check_memory(op: str, value: object) -> None:
    """Raise RuntimeError unless the storage of every tensor in `value` holds its elements.

    value: a tensor, a bundle or a list of these; other values are ignored.
    """
    if isinstance(value, Tensor):
        _check_tensor(op, value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            kind = type(item)  # looking it up takes less time than isinstance does
            if kind in _TENSORS:
                # Most tensors begin with their storage and are contiguous: the bytes of their elements are enough.
                if item.nbytes > item.untyped_storage().nbytes() or item.storage_offset() or not item.is_contiguous():
                    _check_tensor(op, item)
            elif kind not in _WITHOUT_MEMORY:
                check_memory(op, item)


_TENSORS = frozenset((Tensor, Parameter))
_WITHOUT_MEMORY = frozenset((type(None), bool, int, float, str))


def contiguous(op: str, tensor: Tensor) -> Tensor:
    """Return tensor.contiguous(), after a check of the tensor's memory if it has to be copied."""
    if tensor.is_contiguous():
        return tensor
    check_memory(op, tensor)
    return tensor.contiguous()


def _check_tensor(op: str, tensor: Tensor) -> None:
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() and held < _bytes_needed(tensor):
        raise RuntimeError(
            f"{op}: every argument must have memory, got shape {tuple(tensor.shape)} over a storage of {held} bytes; "
            "was it freed?"
        )


def _bytes_needed(tensor: Tensor) -> int:
    if tensor.is_contiguous():  # as most are; the general sum takes three times as long
        return int(tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()
