"""Adapter Tuning: bottlenecks inside each layer.

Source: Houlsby et al. (arXiv:1902.00751); Pfeiffer et al. (arXiv:2005.00247); parallel: He et al. (arXiv:2110.04366).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from .anatomy import Layer
from .base_layer import device_of
from .bottleneck import ACTIVATIONS, Bottleneck
from .config import PeftConfig
from .host import Host
from .method import Method
from .registry import register_method
from .taps import Tap


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(PeftConfig):
    """placement: "houlsby" = h + f(h) after the attention output and after the FFN output, before the residual is
    added; "pfeiffer" = u + f(LayerNorm(u)), u being the sum of residual and FFN output, in the place of the LayerNorm's
    input (in layers that normalise their input: u + f(u)); "parallel" = FFN(x) + f(x), x being the residual
    stream before the FFN and before its LayerNorm, if it has one first.

    bottleneck_size: of f; reduction_factor, if given, sets it to d / reduction_factor.
    non_linearity: None = the authors': GELU with houlsby, else ReLU.
    init: std of the near-identity start, or "lora"; None = 1e-2, and "lora" for parallel.
    scale: factor of f.   train_layer_norm: LayerNorms train too; None = as the paper: with houlsby only.
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
        return self.non_linearity or ("gelu" if self.placement == "houlsby" else "relu")

    @property
    def trains_layer_norm(self) -> bool:
        return self.placement == "houlsby" if self.train_layer_norm is None else self.train_layer_norm

    @property
    def start(self) -> float | Literal["lora"]:
        return self.init if self.init is not None else "lora" if self.placement == "parallel" else 1e-2


@register_method(AdapterConfig)
class Adapter(Method):
    """`tree`: at `<layer>.attention_adapter` and `<layer>.ffn_adapter` a Bottleneck each."""

    config: AdapterConfig

    def __init__(self, config: AdapterConfig, host: Host, name: str) -> None:
        super().__init__(config, host, name)
        self.after_ffn: dict[str, nn.Module] = {}  # by path of the layer
        modules = host.modules()
        for layer in host.anatomy.layers:
            if config.placement == "houlsby":
                self.hooks += self._new_tap(layer, "attention_adapter").behind(host.place(layer.attention_output))
            tap = self._new_tap(layer, "ffn_adapter")
            if config.placement == "parallel":
                self.hooks += tap.beside(host.place(layer.ffn_input), host.place(layer.ffn_output))
            elif config.placement == "houlsby":
                self.hooks += tap.behind(host.place(layer.ffn_output))
            else:
                self.hooks += on_stream(tap, layer, host)
            for norm in layer.norms if config.trains_layer_norm else ():
                for leaf in modules[norm]._parameters:
                    self.overrides.add(f"{norm}.{leaf}")

    def _new_tap(self, layer: Layer, place: str) -> Tap:
        bottleneck = self.new_bottleneck(layer)
        self.tree.put(f"{layer.path}.{place}", bottleneck)
        self.after_ffn[layer.path] = bottleneck
        return Tap(self.host.selection, self.name, bottleneck)

    def new_bottleneck(self, layer: Layer) -> nn.Module:
        d = self.host.width(layer)
        reduced = self.config.reduction_factor
        return Bottleneck(
            d,
            max(1, int(d / reduced)) if reduced else self.config.bottleneck_size,
            non_linearity=self.config.activation,
            init=self.config.start,
            scale=self.config.scale,
            dropout=self.config.dropout,
            device=device_of(self.host.module(layer.norms[0])),
            dtype=self.host.adapter_dtype,
        )


def on_stream(tap: Tap, layer: Layer, host: Host) -> list[RemovableHandle]:
    """Pfeiffer's place: what the tap reads is the residual stream after the FFN, normalised where the layer does so."""
    stream = host.place(layer.stream)
    return tap.before_norm(stream) if layer.post_norm else tap.behind(stream)
