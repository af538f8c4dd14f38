"""NF4 layers of transformers models: lookup, replacement, and state dicts under make_shardable."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn.convert import is_plain_linear
from ..nn.experts_nf4 import ExpertsNF4, is_expert_stack
from ..nn.linear_nf4 import LinearNF4, is_conv1d
from ..nn.module_tree import layers_of, move_hooks, set_submodule
from ..nn.quantized_weight import is_sharded

WEIGHT = "weight"


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return LinearNF4 and ExpertsNF4 modules by name, without those inside adapters."""
    return {name: module for name, module in layers_of(model).items() if isinstance(module, (LinearNF4, ExpertsNF4))}


def dense_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the nn.Linear and Conv1D layers that replace_linear can replace, by name."""
    return {name: module for name, module in layers_of(model).items() if is_plain_linear(module)}


def expert_stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the [experts, ., .] parameters of modules that transformers marks as experts, by name."""
    found = {}
    for name, owner in layers_of(model).items():
        if hasattr(owner, "is_transposed") and hasattr(owner, "is_concatenated"):
            for child, parameter in owner.named_parameters(recurse=False):
                if is_expert_stack(owner, parameter):
                    found[f"{name}.{child}"] = parameter
    return found


def owner_of(model: nn.Module, name: str) -> tuple[Any, str]:
    """Return (the module that has the parameter or module `name`, its name there)."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def is_linear_weight(model: nn.Module, name: str) -> bool:
    """Whether `name` is the weight of an nn.Linear or a Conv1D."""
    owner, attribute = owner_of(model, name)
    return attribute == WEIGHT and (isinstance(owner, nn.Linear) or is_conv1d(owner))


def replace_parameter(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Replace the parameter or module `name`, such as a stack of experts, by `value`."""
    owner, attribute = owner_of(model, name)
    delattr(owner, attribute)
    setattr(owner, attribute, value)


def use_plain_experts(model: nn.Module) -> None:
    """Select transformers' loop over experts, which multiplies by the weight of one expert at a time.

    ExpertsNF4 works in no other of its implementations.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"


def dequantize_modules(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace the NF4 layers by dense layers in `dtype`; returns the model."""
    for name, module in quantized_modules(model).items():
        if isinstance(module, ExpertsNF4):
            stack = nn.Parameter(module.dequantize(dtype=dtype), requires_grad=False)
            replace_parameter(model, name, stack)
            continue
        dense = cast(LinearNF4, module).to_linear(dtype)
        if dense.bias is not None:
            dense.bias.data = dense.bias.data.to(dtype)
        move_hooks(module, dense)
        _move_accelerate_hook(module, dense)
        set_submodule(model, name, dense)
    return model


def state_dict_of_checkpoint(model: Any) -> dict[str, Tensor] | None:
    """Return the state dict of a model under make_shardable with the names of checkpoints, and None for others.

    Raises RuntimeError for a sharded model.
    """
    flat = [m for m in cast(Any, quantized_modules(model)).values() if m.parameter_names_in_state_dict]
    if not flat:
        return None
    if any(is_sharded(p) for module in flat for p in module.flat_parameters().values()):
        raise RuntimeError(
            "save_pretrained: the model must not be sharded, got NF4 weights under fully_shard; call "
            "qlora_kernels.distributed.save_shards(model, folder) in every process"
        )
    for module in flat:
        module.parameter_names_in_state_dict = False
    try:
        return cast("dict[str, Tensor]", model.state_dict())
    finally:
        for module in flat:
            module.parameter_names_in_state_dict = True


def _move_accelerate_hook(source: Any, target: Any) -> None:
    if hasattr(source, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        hook = source._hf_hook
        remove_hook_from_module(source)
        add_hook_to_module(target, hook)
