"""A module tree that mirrors the model's: what an adapter owns lies at the dotted path of what it adapts.

So an adapter's own state_dict() has the keys of its file, `model.layers.0.self_attn.q_proj.lora_A.weight`.
"""

from __future__ import annotations

from torch import nn


class Tree(nn.Module):
    """An nn.Module without a forward; children are made on the way to a path."""

    def put(self, path: str, value: nn.Module | nn.Parameter) -> None:
        parent: nn.Module = self
        *above, last = path.split(".")
        for part in above:
            if part not in parent._modules:
                parent.add_module(part, Tree())
            parent = parent.get_submodule(part)
        if isinstance(value, nn.Parameter):
            parent.register_parameter(last, value)
        else:
            parent.add_module(last, value)
