"""Adapter Tuning: bottlenecks inside each layer.

Source: Houlsby et al. (arXiv:1902.00751); Pfeiffer et al. (arXiv:2005.00247); parallel: He et al. (arXiv:2110.04366).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .anatomy import Layer
from .base_layer import device_of
from .bottleneck import ACTIVATIONS, Bottleneck
from .config import PeftConfig
from .host import Host
from .method import Method
from .registry import register_method
from .taps import OutputTap, ParallelTap


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(PeftConfig):
    """placement: "houlsby" = h + f(h) after the attention output and after the FFN output, before the residual is
    added; "pfeiffer" = after the FFN output only; "parallel" = FFN(x) + f(x).

    bottleneck_size: of f; reduction_factor, if given, sets it to d / reduction_factor.
    init: std of the near-identity start, or "lora"; None = 1e-2, and "lora" for parallel.
    scale: factor of f.   train_layer_norm: LayerNorms train too; None = as the paper: with houlsby only.
    """

    peft_type = "BOTTLENECK_ADAPTER"

    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    bottleneck_size: int = 64
    reduction_factor: float | None = None
    non_linearity: str = "gelu"
    init: float | Literal["lora"] | None = None
    scale: float = 1.0
    dropout: float = 0.0
    train_layer_norm: bool | None = None

    def __post_init__(self) -> None:
        if self.placement not in ("houlsby", "pfeiffer", "parallel"):
            known = "'houlsby', 'pfeiffer' or 'parallel'"
            raise ValueError(f"AdapterConfig: placement must be {known}, got {self.placement!r}")
        if self.non_linearity not in ACTIVATIONS:
            raise ValueError(
                f"AdapterConfig: non_linearity must be one of {sorted(ACTIVATIONS)}, got {self.non_linearity!r}"
            )
        if isinstance(self.init, str) and self.init != "lora":
            raise ValueError(f"AdapterConfig: init must be a number, 'lora' or None, got {self.init!r}")

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
        self.bottlenecks: dict[str, Bottleneck] = {}  # by path of the module whose output changes
        modules = host.modules()
        for layer in host.anatomy.layers:
            for place, path in self._places(layer):
                bottleneck = self.new_bottleneck(layer)
                self.tree.put(f"{layer.path}.{place}", bottleneck)
                self.bottlenecks[path] = bottleneck
                if config.placement == "parallel":
                    between = ParallelTap(host.selection, name, bottleneck)
                    self.hooks += between.attach_between(host.place(layer.ffn_input), host.place(path))
                else:
                    self.hooks += OutputTap(host.selection, name, bottleneck.behind).attach(host.place(path))
            for norm in layer.norms if config.trains_layer_norm else ():
                for leaf in modules[norm]._parameters:
                    self.overrides.add(f"{norm}.{leaf}")

    def _places(self, layer: Layer) -> Iterator[tuple[str, str]]:
        """(name in the tree, path of the module whose output changes)."""
        if self.config.placement == "houlsby":
            yield "attention_adapter", layer.attention_output
        yield "ffn_adapter", layer.ffn_output

    def new_bottleneck(self, layer: Layer) -> Bottleneck:
        d = self.host.width(layer)
        reduced = self.config.reduction_factor
        return Bottleneck(
            d,
            max(1, int(d / reduced)) if reduced else self.config.bottleneck_size,
            non_linearity=self.config.non_linearity,
            init=self.config.start,
            scale=self.config.scale,
            dropout=self.config.dropout,
            device=device_of(self.host.module(layer.norms[0])),
            dtype=self.host.adapter_dtype,
        )
