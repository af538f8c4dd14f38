"""Connections to other libraries. Each module needs the library that it is named after."""

from __future__ import annotations

from torch import nn


def from_bnb(model: nn.Module) -> nn.Module:
    """Replace the bitsandbytes layers of `model` by LinearNF4; see integrations.bitsandbytes.from_bnb."""
    from .bitsandbytes import from_bnb as convert

    return convert(model)


def to_bnb(model: nn.Module) -> nn.Module:
    """Replace the LinearNF4 layers of `model` by bitsandbytes' Linear4bit; see integrations.bitsandbytes.to_bnb."""
    from .bitsandbytes import to_bnb as convert

    return convert(model)
