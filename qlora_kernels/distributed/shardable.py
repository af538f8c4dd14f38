"""make_shardable: prepares a QLoRA model for torch's fully_shard."""

from __future__ import annotations

import torch
from torch import nn

from ..nn.module_tree import shards
from ..nn.quantized_weight import QuantizedWeight
from .ddp import freeze_into_parameters

OLDEST = (2, 13)
"""The first torch version whose fully_shard accepts integer parameters."""


def make_shardable(model: nn.Module) -> nn.Module:
    """Prepare the NF4 weights of `model` for torch's `fully_shard` (FSDP2); returns the model, changed in place.

    The packed indices and the constants become frozen integer parameters over the same memory, which FSDP2 shards at
    any row and gathers in their 4-bit form. State dicts then have them under the parameters' own names (`packed_flat`,
    `absmax_q_flat`, ...), as torch.distributed.checkpoint needs; both kinds of names can be loaded. The function may be
    called again after adapters or layers were added. The order of calls is:

        make_shardable(model); block.compile() for each block; fully_shard(block) for each block; fully_shard(model)

    Raises NotImplementedError under a torch whose fully_shard refuses integers; RuntimeError if a module with NF4
    weights is already sharded, compiled or inside DistributedDataParallel.
    """
    check_torch("make_shardable")
    for name, module in model.named_modules():
        if reason := _too_early(module):
            raise RuntimeError(
                f"make_shardable: {name or 'the model'} must not be {reason} yet, because the NF4 weights in it would "
                "be left out; call make_shardable before that"
            )
    for module in freeze_into_parameters(model):
        module.parameter_names_in_state_dict = True
    return model


def check_torch(name: str) -> None:
    """Raise NotImplementedError under a torch whose fully_shard refuses integers.   name: for the message."""
    if _version() < OLDEST:
        raise NotImplementedError(
            f"{name}: torch must be {OLDEST[0]}.{OLDEST[1]} or newer, whose fully_shard takes integer parameters, got "
            f"{torch.__version__}; use DistributedDataParallel, which needs no preparation"
        )


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _too_early(module: nn.Module) -> str | None:
    """Return what was done too early to a module with NF4 weights in buffers, or None."""
    pending = any(isinstance(m, QuantizedWeight) and not m.parameter_names_in_state_dict for m in module.modules())
    if not pending:
        return None
    if shards(module):
        return "sharded by fully_shard"
    if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
        return "compiled"
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "wrapped by DistributedDataParallel"
    return None
