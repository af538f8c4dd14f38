"""Where the engine meets other libraries. Each module needs the library that it is named for."""

from __future__ import annotations

from torch import nn


def from_bnb(model: nn.Module) -> nn.Module:
    """The layers of bitsandbytes in `model` become LinearNF4: integrations.bitsandbytes.from_bnb."""
    from .bitsandbytes import from_bnb as convert

    return convert(model)


def to_bnb(model: nn.Module) -> nn.Module:
    """The LinearNF4 layers of `model` become bitsandbytes' Linear4bit: integrations.bitsandbytes.to_bnb."""
    from .bitsandbytes import to_bnb as convert

    return convert(model)
