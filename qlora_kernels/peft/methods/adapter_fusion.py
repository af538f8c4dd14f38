"""AdapterFusion: trained attention over the outputs of adapters that were trained separately and stay frozen.

Source: Pfeiffer et al. (arXiv:2005.00247).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...nn.match import as_names
from ..core.adapter_selection import AdapterSelection
from ..core.adapter_tree import Place
from ..core.config import PeftConfig
from ..framework.injector import Injector
from ..framework.method import Method
from ..framework.registry import register_method
from ..layers.base_layer import device_of
from ..layers.hooks import AdapterHook
from .adapter import Adapter, attach_to_stream

SLOT = "adapter_fusion"


@dataclass(frozen=True, kw_only=True)
class AdapterFusionConfig(PeftConfig):
    """Configuration of AdapterFusion.

    adapters: names of the adapters to fuse, which are in the model and have AdapterConfig(placement="pfeiffer").

    value: whether there is a value matrix V, which starts near the identity. regularization: weight of |V - I|^2 in
    peft_loss().
    """

    peft_type = "ADAPTER_FUSION"

    adapters: list[str] | tuple[str, ...] | str = ()
    value: bool = True
    regularization: float = 0.01


class Fusion(nn.Module):
    """Attention over bottleneck outputs z_n = f_n(h): sum_n s_n V z_n, s = softmax over n of (Q h) . (K z_n).

    Q and K are linear with bias, weights N(0, 0.02); V has ones on the diagonal and 1e-6 elsewhere.
    """

    def __init__(self, d: int, value: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.query = nn.Linear(d, d, device=device, dtype=dtype)
        self.key = nn.Linear(d, d, device=device, dtype=dtype)
        self.value = nn.Linear(d, d, bias=False, device=device, dtype=dtype) if value else None
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.value is not None:
            with torch.no_grad():
                self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def forward(self, h: Tensor, bottlenecks: Sequence[nn.Module]) -> Tensor:
        inner = h.to(self.query.weight.dtype)
        z = torch.stack([bottleneck(inner) for bottleneck in bottlenecks], dim=-2)  # [..., N, d]
        scores = (self.key(z) @ self.query(inner)[..., None])[..., 0]  # [..., N]
        mixed: Tensor = (scores.softmax(-1)[..., None] * (z if self.value is None else self.value(z))).sum(-2)
        return mixed.to(h.dtype)

    def penalty(self) -> Tensor | None:
        """Return the sum of the squares of V - I, or None without a value matrix."""
        if self.value is None:
            return None
        identity = torch.eye(self.value.out_features, device=self.value.weight.device, dtype=self.value.weight.dtype)
        return (self.value.weight - identity).square().sum()


class FusionHook(AdapterHook):
    """Hook that adds the fusion. `bottlenecks`: paths of the fused bottlenecks below the module that has the fusion."""

    def __init__(self, selection: AdapterSelection, name: str, place: Place, bottlenecks: Sequence[Place]) -> None:
        super().__init__(selection, name, place)
        self.bottlenecks = tuple(bottlenecks)

    def update(self, module: nn.Module, x: Tensor) -> Tensor:
        fusion = cast(nn.ModuleDict, module._modules[self.place.slot])[self.place.key]
        bottlenecks = [cast(nn.ModuleDict, module._modules[place.slot])[place.key] for place in self.bottlenecks]
        return fusion(x, bottlenecks)  # type: ignore[no-any-return]


@register_method(AdapterFusionConfig)
class AdapterFusion(Method):
    """A Fusion in each layer, stored in files as `<layer>.fusion`. `needs` lists the fused adapters, which are not
    changed.
    Raises ValueError for fewer than two adapters.
    """

    config: AdapterFusionConfig

    def __init__(self, config: AdapterFusionConfig, injector: Injector, name: str) -> None:
        fused = {adapter: _pfeiffer(injector, adapter) for adapter in as_names(config.adapters)}
        if len(fused) < 2:
            raise ValueError(f"AdapterFusion: adapters must name at least two, got {list(fused)}")
        super().__init__(config, injector, name)
        self.needs = tuple(fused)
        self.built: dict[str, Fusion] = {}
        for layer in injector.layout.layers:
            device = device_of(injector.module(layer.norms[0]))
            self.built[layer.path] = Fusion(injector.width(layer), config.value, device, injector.adapter_dtype)

    def attach(self) -> None:
        super().attach()
        injector = self.injector
        fused = [_pfeiffer(injector, adapter) for adapter in self.needs]
        for layer in injector.layout.layers:
            bottlenecks = [adapter.tree.places[f"{layer.path}.ffn_adapter"] for adapter in fused]
            fusion = self.built.pop(layer.path)
            place = self.tree.add(f"{layer.path}.fusion", fusion, owner=layer.stream, slot=SLOT)
            hook = FusionHook(injector.selection, self.name, place, bottlenecks)
            self.hooks += attach_to_stream(hook, layer, injector)

    def peft_loss(self) -> Tensor | None:
        fusions = [cast(Fusion, self.tree[path]) for path, place in self.tree.places.items() if place.slot == SLOT]
        penalties = [penalty for fusion in fusions if (penalty := fusion.penalty()) is not None]
        return self.config.regularization * torch.stack(penalties).sum() if penalties else None


def _pfeiffer(injector: Injector, name: str) -> Adapter:
    if name not in injector.adapters:
        raise ValueError(
            f"AdapterFusion: adapter {name!r} must be in the model first; it has {list(injector.adapters)}"
        )
    found = [m for m in injector.adapters[name] if isinstance(m, Adapter)]
    if len(found) != 1 or found[0].config.placement != "pfeiffer":
        raise ValueError(f"AdapterFusion: adapter {name!r} must be an AdapterConfig(placement='pfeiffer')")
    return found[0]
