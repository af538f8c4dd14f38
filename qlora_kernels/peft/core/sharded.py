"""Adapters whose parameters are sharded (FSDP2): files hold whole tensors, and one process writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.distributed as dist
from torch import Tensor

from ...nn.quantized_weight import is_sharded


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with sharded ones gathered. Every process must call this function with the same names."""
    return {name: full_tensor(tensor) for name, tensor in tensors.items()}


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor of a DTensor, and any other tensor unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def write_on_rank_zero(write: Callable[[], None], operation: str = "save_pretrained") -> None:
    """Run `write` on rank 0. Every process returns when it is done, and raises if it failed.

    operation: name for the message of the other processes' error.
    """
    failed: list[str | None] = [None]
    error: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            write()
        except BaseException as caught:
            error, failed = caught, [f"{type(caught).__name__}: {caught}"]
    dist.broadcast_object_list(failed, src=0)
    if error is not None:
        raise error
    if failed[0] is not None:
        raise RuntimeError(f"{operation}: rank 0 must be able to write the files, got {failed[0]}")
