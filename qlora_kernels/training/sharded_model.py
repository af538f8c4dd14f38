"""Training of a model under fully_shard (FSDP2): the parts of the loop that differ for DTensor parameters.

All processes run the same number of forwards and backwards, because each of them gathers parameters. Checkpoints hold
whole tensors, so that a run continues with any number of processes, sharded or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..nn.module_tree import shards
from ..nn.quantized_weight import cut_as
from ..nn.quantized_weight import is_sharded as is_dtensor
from .batches import Batch
from .windows import IGNORED

T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard was applied to `model` itself."""
    return shards(model)


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters, so that `model.parameters()` are the sharded ones; nothing without fully_shard.

    The outermost group stays gathered after a forward without a backward.
    """
    for module in _groups(model):
        module.reshard()


def sum_gradients(model: nn.Module) -> None:
    """Make FSDP2 sum gradients over the processes, where it averages by default, and count missing ones as zero."""
    for module in _groups(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else gloo would need an operation that only NCCL has
    if is_sharded(model):
        cast(Any, model).set_reduce_scatter_unused_params(True)


def idle_batch(batch: Batch) -> Batch:
    """Return a small batch from which nothing is learned, for a process that has no examples left in a step."""
    ids = batch.input_ids[:1, :2]
    return Batch(ids, torch.full_like(ids, IGNORED), None)


def in_equal_numbers(own: Sequence[T], total: int, world: int, idle: T) -> list[T]:
    """Return `own`, this process's part of `total` items, with `idle` appended up to the length of the longest part."""
    return [*own, *[idle] * (math.ceil(total / world) - len(own))]


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Clip the gradients as clip_grad_norm_ does, and return their norm over all processes' parts."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def whole(value: Any) -> Any:
    """Return the full tensor of a DTensor; any other value itself. Every process has to call it."""
    return value.full_tensor() if is_dtensor(value) else value


def gathered(value: Any, keep: bool) -> Any:
    """Return nested dicts, lists and tuples with their DTensors gathered, one at a time, on the CPU.

    keep: whether this process keeps the gathered tensors; the others get None for them. Every process has to call it.
    """
    if is_dtensor(value):
        part: Any = value.detach()
        full = part.full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: gathered(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item, keep) for item in value)
    return value


def copy_into(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy a tensor into a parameter; of a whole tensor, the part of this process into its shard."""
    parameter.copy_(value if is_dtensor(value) else cut_as(parameter, value))


class ShardedState:
    """An optimizer whose load_state_dict takes the whole tensors of a checkpoint for DTensor parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> Mapping[str, Any]:
        """Return the optimizer's state dict, whose states are DTensors."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict, each tensor of a parameter's shape cut as the parameter is."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            number: {name: _cut(parameters[number], value) for name, value in entry.items()}
            for number, entry in state_dict["state"].items()
        }
        self.optimizer.load_state_dict({**state_dict, "state": state})


def _cut(parameter: nn.Parameter, value: Any) -> Any:
    alike = isinstance(value, Tensor) and value.shape == parameter.shape
    return cut_as(parameter, value) if alike else value


def _groups(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if shards(module))
