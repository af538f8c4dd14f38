"""UniPELT: LoRA, prefix and adapter in every layer, each scaled by a gate that is computed from the input.

Source: Mao et al. (arXiv:2110.07577), and the authors' code for details that the paper does not give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.model_layout import TransformerLayer
from ..attention.prefix_slot import SLOT, Prefix
from ..core.adapter_selection import AdapterSelection, PerThread
from ..core.config import PeftConfig
from ..framework.composite import Composite
from ..framework.injector import Injector
from ..framework.linear_method import LinearMethod
from ..framework.registry import register_method
from ..layers.base_layer import device_of, features
from ..layers.delta import Delta
from ..layers.gate import Gate, padding_of
from .adapter import Adapter, AdapterConfig
from .lora_config import LoraConfig
from .lora_layers import LoraLinear
from .prefix_tuning import PrefixEncoder, PrefixPart, PrefixTuning, PrefixTuningConfig, part_path


@dataclass(frozen=True, kw_only=True)
class UniPELTConfig(PeftConfig):
    """Configuration of UniPELT with the authors' defaults: prefixes of 10 from an MLP of width 512, LoRA of rank 8 on
    queries and values, and adapters of width d/16 after the FFN. The gate of a LoRA replaces alpha / r.

    target_modules: layers with LoRA; None = the model's query and value projections.
    """

    peft_type = "UNIPELT"

    prefix_length: int = 10
    prefix_hidden_size: int = 512
    lora_r: int = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | tuple[str, ...] | str | None = None
    reduction_factor: float = 16.0
    non_linearity: str = "relu"
    position_offset: bool | None = None

    @property
    def lora(self) -> LoraConfig:
        """The configuration of the LoRA part."""
        return LoraConfig(r=self.lora_r, lora_dropout=self.lora_dropout, target_modules=self.target_modules)


class GatedLoraLinear(Delta):
    """Gated LoRA update of a linear layer: y + g(x) * B A dropout(x)."""

    def __init__(self, lora: LoraLinear, gate: Gate, injector: Injector, name: str) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.gate = lora.lora_A, lora.lora_B, gate
        self.dropout_p = lora.dropout_p
        self.selection, self.name = injector.selection, name

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        g = self.gate(x, padding_of(self.selection, self.name, x))
        inner = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout_p, self.training)
        updated: Tensor = y + g * self.lora_B(self.lora_A(inner))
        return updated.to(y.dtype)


class GatedLora(LinearMethod[GatedLoraLinear]):
    """LoRA whose updates depend on the input."""

    config: LoraConfig

    def new_delta(self, path: str, base: nn.Module) -> GatedLoraLinear:
        lora = LoraLinear(base, self.config.r, 1.0, self.config, self.injector.adapter_dtype)
        return GatedLoraLinear(lora, new_gate(self.injector, path, features(base)[0]), self.injector, self.name)

    def merge_unsupported(self) -> str:
        return "its gates depend on the input"


class GatedBottleneck(nn.Module):
    """Bottleneck whose output is multiplied by its gate: g(h) * f(h)."""

    def __init__(self, bottleneck: nn.Module, gate: Gate, injector: Injector, name: str) -> None:
        super().__init__()
        self.bottleneck, self.gate = bottleneck, gate
        self.selection, self.name = injector.selection, name

    def forward(self, h: Tensor) -> Tensor:
        g = self.gate(h, padding_of(self.selection, self.name, h))
        y: Tensor = g * self.bottleneck(h)
        return y


class GatedAdapter(Adapter):
    """Adapter method whose bottlenecks are multiplied by gates."""

    def new_bottleneck(self, layer: TransformerLayer) -> GatedBottleneck:
        """Build a bottleneck with a gate for a transformer layer."""
        gate = new_gate(self.injector, layer.ffn_output, self.injector.width(layer))
        return GatedBottleneck(super().new_bottleneck(layer), gate, self.injector, self.name)


class GatedPrefixPart(PrefixPart):
    """Prefix part with one gate for keys and values, computed from the attention's input h."""

    gate: Gate
    selection: AdapterSelection

    def __init__(self, adapter: str, encoder: PrefixEncoder, layer: int) -> None:
        super().__init__(adapter, encoder, layer)
        self.h: PerThread[Tensor | None] = PerThread()

    def forward(self) -> Prefix:
        """Return the gated prefix. Raises RuntimeError if the attention was called without its input."""
        keys, values = self.encoder(self.layer)
        h = self.h.get()
        if h is None:
            raise RuntimeError("UniPELT: an attention must get its input as its first argument or as hidden_states")
        padding = self.selection.state.padding
        fits = padding is not None and padding.shape == h.shape[:2]
        g = self.gate(h, padding if fits else None)
        if self.gate.per_token:
            return Prefix(keys, values, gate=g)
        return Prefix(keys * g[..., None], values * g[..., None])


class GatedPrefix(PrefixTuning):
    """Prefix tuning with gates, which are `<layer>.prefix_gate` in the tree."""

    part_type = GatedPrefixPart

    def new_part(self, site: str, path: str, encoder: PrefixEncoder, layer: int) -> PrefixPart:
        part = cast(GatedPrefixPart, super().new_part(site, path, encoder, layer))
        owner = cast(TransformerLayer, self.injector.layer_of(path))
        part.gate = new_gate(self.injector, path, self.injector.width(owner))
        part.selection = self.injector.selection
        return part

    def _attach(self, path: str, part: PrefixPart) -> None:
        super()._attach(path, part)
        layer = cast(TransformerLayer, self.injector.layer_of(path))
        place = self.tree.places[part_path(path)]
        self.tree.add_inner(f"{layer.path}.prefix_gate", place, "gate")
        remember = RememberInput(place.key)
        self.hooks.append(self.injector.hooked_module(path).register_forward_pre_hook(remember, with_kwargs=True))


@dataclass
class RememberInput:
    """Hook that stores an attention's input h for the gate of the prefix at entry `key` of its slot."""

    key: str

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        part = cast(GatedPrefixPart, cast(nn.ModuleDict, attention._modules[SLOT])[self.key])
        part.h.put(args[0] if args else kwargs.get("hidden_states", kwargs.get("query")))


def new_gate(injector: Injector, path: str, d: int) -> Gate:
    """Build the gate of size d for the module at `path`, per token in decoders."""
    layer = injector.layer_of(path)
    device = device_of(injector.module(layer.norms[0] if layer else path))
    return Gate(d, layer is not None and layer.stack == "decoder", device, injector.adapter_dtype)


@register_method(UniPELTConfig)
class UniPELT(Composite):
    """LoRA, prefix and adapter with gates. Gates are averaged over the sequence in encoders, and per token in
    decoders.
    """

    config: UniPELTConfig

    @classmethod
    def check_names(cls, config: PeftConfig, injector: Injector) -> None:
        super().check_names(config, injector)
        assert isinstance(config, UniPELTConfig)
        GatedLora.check_names(config.lora, injector)

    def __init__(self, config: UniPELTConfig, injector: Injector, name: str) -> None:
        super().__init__(config, injector, name)
        sites = tuple({layer.stack for layer in injector.layout.layers})
        prefix = PrefixTuningConfig(
            num_virtual_tokens=config.prefix_length,
            encoder_hidden_size=config.prefix_hidden_size,
            sites=sites,
            position_offset=config.position_offset,
        )
        adapter = AdapterConfig(
            placement="pfeiffer", reduction_factor=config.reduction_factor, non_linearity=config.non_linearity
        )
        self.add(
            {
                "lora": GatedLora(config.lora, injector, name),
                "prefix": GatedPrefix(prefix, injector, name),
                "adapter": GatedAdapter(adapter, injector, name),
            }
        )
