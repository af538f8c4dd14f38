"""DTensor parameters: access to the local part, and DTensors made of local tensors.

FSDP2 and tensor parallelism make DTensors of parameters. The kernels and the arena use the local tensor. The gradients,
the states in `state` and those in state dicts are DTensors with the sharding of the parameter, so that
torch.distributed.checkpoint saves and reshards them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

LIKE_PARAMETER = ("exp_avg", "exp_avg_sq")
"""States with one element for each element of the parameter."""


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor; does not import torch.distributed.tensor, which is slow to import."""
    return isinstance(tensor, Tensor) and type(tensor).__name__ == "DTensor" and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a DTensor, over the same memory; return any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    part: Any = tensor._local_tensor
    return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return] # an asynchronous result


def as_part_of(param: Tensor, value: Tensor) -> Tensor:
    """Return `value`, of the local part's shape, as a DTensor sharded as `param`; itself if param is not a DTensor."""
    if not is_dtensor(param):
        return value
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())


def local_grad(param: Tensor) -> Tensor | None:
    """Return the local part of the gradient, sharded as the parameter.

    Raises TypeError if a DTensor parameter has a plain gradient.
    """
    grad = param.grad
    if grad is None or not is_dtensor(param):
        return grad
    if not is_dtensor(grad):
        raise TypeError("PagedAdamW: the gradient of a DTensor parameter must be a DTensor, got a plain tensor")
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def local_state(param: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state with this process's parts of its DTensors and of its whole tensors.

    Raises ValueError for a state of another shape than the parameter's.
    """
    if not is_dtensor(param):
        return dict(saved)
    from torch.distributed.tensor import distribute_tensor

    result = dict(saved)
    for name in LIKE_PARAMETER:
        value = saved.get(name)
        if not isinstance(value, Tensor) or (value.shape == local(param).shape != param.shape):
            continue
        if value.shape != param.shape:
            expected, got = tuple(param.shape), tuple(value.shape)
            raise ValueError(f"PagedAdamW.load_state_dict: {name} must have shape {expected}, got {got}")
        if is_dtensor(value):
            part = value.redistribute(param.device_mesh, param.placements)
        else:
            part = distribute_tensor(value.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
        result[name] = local(part)
    step = saved.get("step")
    if is_dtensor(step):
        result["step"] = step.full_tensor()
    return result


def total_norm(grads: list[Tensor]) -> Tensor:
    """Return the norm over all gradients, for DTensors over all their parts; it is the same in every process."""
    groups: dict[Any, list[Tensor]] = {}
    for grad in grads:
        groups.setdefault((grad.device_mesh, grad.placements) if is_dtensor(grad) else None, []).append(grad)
    norms = [get_total_norm(group) for group in groups.values()]
    norms = [norm.full_tensor() if is_dtensor(norm) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
