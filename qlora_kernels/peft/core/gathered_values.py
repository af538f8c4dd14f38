"""Values of sharded parameters that were gathered by someone else: by transformers' Trainer, or here from ZeRO-3.

FSDP2 shards parameters as DTensors, which `sharded.py` gathers. DeepSpeed's ZeRO-3 leaves parameters without elements
and keeps the shards in attributes of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...nn.module_tree import WRAPPED
from ...nn.quantized_weight import is_sharded


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps the parameter in parts."""
    return hasattr(parameter, "ds_tensor") and hasattr(parameter, "ds_shape")


def values_of_partitioned(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole values of the trained parameters that ZeRO-3 keeps in parts. Every process must call it."""
    parts = {n: p for n, p in model.named_parameters() if p.requires_grad and is_partitioned(p)}
    if not parts:
        return {}
    gathered: Any = importlib.import_module("deepspeed").zero.GatheredParameters
    values = {}
    for name, parameter in parts.items():
        with gathered([parameter]):
            values[name] = parameter.detach().clone()
    return values


@contextmanager
def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters of `model` that `values` names are these whole tensors. The model must not run.

    Raises ValueError, naming the tensor, for another shape, or for one that is itself sharded.
    """
    made: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = values.get(_canonical(name), values.get(name))
        if value is not None and id(parameter) not in made:
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if is_sharded(value) or tuple(value.shape) != shape:
                got = "a shard" if is_sharded(value) else f"the shape {tuple(value.shape)}"
                raise ValueError(f"state_dict: {name} must be the whole tensor, of shape {shape}, got {got}")
            made[id(parameter)] = nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for leaf, own in module._parameters.items():
                if own is not None and id(own) in made:
                    replaced.append((module, leaf, own))
        for module, leaf, own in replaced:
            module._parameters[leaf] = made[id(own)]
        yield
    finally:
        for module, leaf, own in replaced:
            module._parameters[leaf] = own


def _canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPED)
