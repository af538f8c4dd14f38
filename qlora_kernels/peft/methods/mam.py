"""MAM Adapter: prefix tuning in the attention, a scaled parallel adapter at the FFN.

Source: He et al. (arXiv:2110.04366).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import PeftConfig
from ..framework.composite import Composite
from ..framework.injector import Injector
from ..framework.registry import register_method
from .adapter import Adapter, AdapterConfig
from .prefix_tuning import PrefixTuning, PrefixTuningConfig


@dataclass(frozen=True, kw_only=True)
class MAMConfig(PeftConfig):
    """Configuration of the paper: prefixes of 30 from an MLP of width 800; bottlenecks of 512 with ReLU and scale 4,
    zero at the start.
    """

    peft_type = "MAM"

    prefix_length: int = 30
    prefix_hidden_size: int = 800
    bottleneck_size: int = 512
    scale: float = 4.0
    non_linearity: str = "relu"
    dropout: float = 0.0
    prefix_dropout: float = 0.0
    position_offset: bool | None = None


@register_method(MAMConfig)
class MAM(Composite):
    """A parallel adapter, y = FFN(x) + scale * up(relu(down(x))), and prefixes, softmax(Q [P_k; K]^T) [P_v; V], in
    every layer.
    """

    def __init__(self, config: MAMConfig, injector: Injector, name: str) -> None:
        super().__init__(config, injector, name)
        prefix = PrefixTuningConfig(
            num_virtual_tokens=config.prefix_length,
            prefix_projection=True,
            encoder_hidden_size=config.prefix_hidden_size,
            prefix_dropout=config.prefix_dropout,
            position_offset=config.position_offset,
        )
        adapter = AdapterConfig(
            placement="parallel",
            bottleneck_size=config.bottleneck_size,
            non_linearity=config.non_linearity,
            init="lora",
            scale=config.scale,
            dropout=config.dropout,
        )
        self.add({"prefix": PrefixTuning(prefix, injector, name), "adapter": Adapter(adapter, injector, name)})
