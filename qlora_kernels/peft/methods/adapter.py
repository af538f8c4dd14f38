"""Adapter Tuning: trained bottleneck networks inside each transformer layer.

Source: Houlsby et al. (arXiv:1902.00751); Pfeiffer et al. (arXiv:2005.00247); parallel: He et al. (arXiv:2110.04366).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..attention.model_layout import TransformerLayer
from ..core.config import PeftConfig
from ..framework.injector import Injector
from ..framework.method import Method
from ..framework.registry import register_method
from ..layers.base_layer import device_of
from ..layers.bottleneck import ACTIVATIONS, Bottleneck
from ..layers.hooks import AdapterHook


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(PeftConfig):
    """placement: "houlsby" = h + f(h) after the attention output and after the FFN output, before the residual is
    added; "pfeiffer" = u + f(LayerNorm(u)) as input of the LayerNorm after the FFN, where u is the sum of residual and
    FFN output (in layers that normalise their input: u + f(u)); "parallel" = FFN(x) + f(x), where x is the residual
    stream before the FFN and before its LayerNorm, if that comes first.

    bottleneck_size: inner width of f; reduction_factor, if given, sets it to d / reduction_factor.
    non_linearity: None = the authors' choice, GELU with houlsby and else ReLU.
    init: std of the near-identity start, or "lora"; None = 1e-2, and "lora" for parallel.
    scale: factor of f.
    train_layer_norm: whether LayerNorms train too; None = with houlsby only, as in the papers.
    Raises ValueError, naming the field, for an unknown placement, non_linearity or init.
    """

    peft_type = "BOTTLENECK_ADAPTER"

    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    bottleneck_size: int = 64
    reduction_factor: float | None = None
    non_linearity: str | None = None
    init: float | Literal["lora"] | None = None
    scale: float = 1.0
    dropout: float = 0.0
    train_layer_norm: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement not in ("houlsby", "pfeiffer", "parallel"):
            known = "'houlsby', 'pfeiffer' or 'parallel'"
            raise ValueError(f"AdapterConfig: placement must be {known}, got {self.placement!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"AdapterConfig: non_linearity must be one of {sorted(ACTIVATIONS)}, got {self.non_linearity!r}"
            )
        if isinstance(self.init, str) and self.init != "lora":
            raise ValueError(f"AdapterConfig: init must be a number, 'lora' or None, got {self.init!r}")

    @property
    def activation(self) -> str:
        """Name of the non-linearity: the field's value, or the authors' choice for the placement."""
        return self.non_linearity or ("gelu" if self.placement == "houlsby" else "relu")

    @property
    def trains_layer_norm(self) -> bool:
        """Whether LayerNorms train too: the field's value, or the paper's for the placement."""
        return self.placement == "houlsby" if self.train_layer_norm is None else self.train_layer_norm

    @property
    def start(self) -> float | Literal["lora"]:
        """The initialization: the field's value, or the paper's for the placement."""
        if self.init is not None:
            return self.init
        return "lora" if self.placement == "parallel" else 1e-2


@register_method(AdapterConfig)
class Adapter(Method):
    """Bottleneck networks in each layer, stored in files as `<layer>.attention_adapter` and `<layer>.ffn_adapter`."""

    config: AdapterConfig

    def __init__(self, config: AdapterConfig, injector: Injector, name: str) -> None:
        super().__init__(config, injector, name)
        slots = ("attention_adapter", "ffn_adapter") if config.placement == "houlsby" else ("ffn_adapter",)
        self.built = {
            f"{layer.path}.{slot}": self.new_bottleneck(layer) for layer in injector.layout.layers for slot in slots
        }

    def attach(self) -> None:
        super().attach()
        config, injector = self.config, self.injector
        modules = injector.modules()
        for layer in injector.layout.layers:
            if config.placement == "houlsby":
                hook = self._add_bottleneck(layer, "attention_adapter", layer.attention_output)
                self.hooks += hook.after(injector.hooked_module(layer.attention_output))
            hook = self._add_bottleneck(layer, "ffn_adapter", self.ffn_owner(layer))
            if config.placement == "parallel":
                # The FFN module itself, because the bottleneck needs its input; not the last layer of a container.
                self.hooks += hook.parallel(
                    injector.called_module(layer.ffn_input), injector.hooked_module(layer.ffn_output)
                )
            elif config.placement == "houlsby":
                self.hooks += hook.after(injector.hooked_module(layer.ffn_output))
            else:
                self.hooks += attach_to_stream(hook, layer, injector)
            for norm in layer.norms if config.trains_layer_norm else ():
                for leaf in modules[norm]._parameters:
                    self.overrides.add(f"{norm}.{leaf}")

    def ffn_owner(self, layer: TransformerLayer) -> str:
        """Return the path of the module at which the bottleneck after the FFN acts: on its output, or on the input of a
        LayerNorm.
        """
        return layer.stream if self.config.placement == "pfeiffer" else layer.ffn_output

    def _add_bottleneck(self, layer: TransformerLayer, slot: str, owner: str) -> AdapterHook:
        path = f"{layer.path}.{slot}"
        place = self.tree.add(path, self.built.pop(path), owner=owner, slot=slot)
        return AdapterHook(self.injector.selection, self.name, place)

    def new_bottleneck(self, layer: TransformerLayer) -> nn.Module:
        """Build the bottleneck network of a transformer layer."""
        d = self.injector.width(layer)
        reduced = self.config.reduction_factor
        return Bottleneck(
            d,
            max(1, int(d / reduced)) if reduced else self.config.bottleneck_size,
            non_linearity=self.config.activation,
            init=self.config.start,
            scale=self.config.scale,
            dropout=self.config.dropout,
            device=device_of(self.injector.module(layer.norms[0])),
            dtype=self.injector.adapter_dtype,
        )


def attach_to_stream(hook: AdapterHook, layer: TransformerLayer, injector: Injector) -> list[RemovableHandle]:
    """Attach `hook` for Pfeiffer's placement: it reads the residual stream after the FFN, normalised if the layer
    normalises it.
    """
    stream = injector.hooked_module(layer.stream)
    return hook.before_norm(stream) if layer.post_norm else hook.after(stream)
