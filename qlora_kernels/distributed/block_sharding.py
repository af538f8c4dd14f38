"""shard_blocks: make_shardable and torch's fully_shard on the blocks of a transformer and on the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .shardable import make_shardable


def shard_blocks(
    model: nn.Module,
    device: torch.device | str,
    *,
    block_classes: Collection[str] = (),
    reshard_after_forward: bool = True,
) -> list[str]:
    """Shard a model, with its adapters, over all processes, and return the names of the blocks.

    device: the model's tensors are moved to it block by block, so that it holds one whole block at a time.
    block_classes: names of the blocks' classes; without them, those that transformers does not split over devices
    (`_no_split_modules`), or else the items of the outermost nn.ModuleLists.
    reshard_after_forward: whether a block is freed after its forward and gathered again for its backward.
    The rest of the model is one group, which stays gathered from its forward to the end of its backward, so that the
    output head can run outside of the model's forward. A module that several blocks have in common, such as the encoder
    of prefix tuning, is a group of its own. `generate` gathers as forward does.
    Raises ValueError if the model has no blocks, NotImplementedError if blocks share a parameter otherwise; see
    make_shardable for the other errors.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    make_shardable(model)
    blocks = blocks_of(model, block_classes)
    if not blocks:
        wanted = sorted(block_classes) or "_no_split_modules or an nn.ModuleList"
        raise ValueError(f"shard_blocks: {type(model).__name__} must have blocks, got none for {wanted}; name a class")
    mesh = init_device_mesh(torch.device(device).type, (torch.distributed.get_world_size(),))
    for part in _shared_parts(blocks):
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    for block in blocks.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    return list(blocks)


def blocks_of(model: nn.Module, classes: Collection[str] = ()) -> dict[str, nn.Module]:
    """Return the outermost modules of these classes, or of those that shard_blocks would take, by name."""
    names = set(classes) or {name for module in model.modules() for name in _not_split(module)}
    if names:
        return dict(_outermost(model, lambda module: not names.isdisjoint(k.__name__ for k in type(module).__mro__)))
    lists = dict(_outermost(model, lambda module: isinstance(module, nn.ModuleList)))
    return {f"{path}.{name}": item for path, items in lists.items() for name, item in items.named_children()}


def _shared_parts(blocks: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Return the outermost modules with parameters that several blocks contain."""
    uses = Counter(id(module) for block in blocks.values() for module in block.modules())
    parts: dict[int, nn.Module] = {}
    inside: set[int] = set()
    for block in blocks.values():
        for module in block.modules():
            if uses[id(module)] > 1 and id(module) not in inside and next(module.parameters(), None) is not None:
                parts[id(module)] = module
                inside |= {id(other) for other in module.modules()}
    of_parts = {id(parameter) for part in parts.values() for parameter in part.parameters()}
    seen: dict[int, str] = {}
    for path, block in blocks.items():
        for name, parameter in block.named_parameters():
            first = seen.setdefault(id(parameter), path)
            if first != path and id(parameter) not in of_parts:
                raise NotImplementedError(
                    f"shard_blocks: {name} of {path} must not be a parameter of another block too, got one of {first}"
                )
    return list(parts.values())


def held_bytes_of(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of the frozen and of the trained parameters that this process holds, each counted once."""
    frozen = trained = 0
    for parameter in model.parameters():
        local: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if parameter.requires_grad:
            trained += local.nbytes
        else:
            frozen += local.nbytes
    return frozen, trained


def _not_split(module: nn.Module) -> Collection[str]:
    return getattr(module, "_no_split_modules", None) or ()


def _outermost(model: nn.Module, chosen: Any) -> Iterator[tuple[str, nn.Module]]:
    taken: list[str] = []
    for name, module in model.named_modules():
        if name and chosen(module) and not any(name.startswith(f"{other}.") for other in taken):
            taken.append(name)
            yield name, module
