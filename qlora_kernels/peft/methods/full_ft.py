"""Full fine-tuning as a method: all parameters train, as a baseline for comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.config import PeftConfig
from ..framework.injector import Injector
from ..framework.method import Method
from ..framework.registry import register_method
from ..layers.base_layer import is_quantized


@dataclass(frozen=True, kw_only=True)
class FullFTConfig(PeftConfig):
    """Every parameter of the model trains. The base is copied, so that disable_adapter can restore it."""

    peft_type = "FULL_FT"


@register_method(FullFTConfig)
class FullFT(Method):
    """Trained copies of all parameters, which replace the originals while the adapter is active. Tied parameters stay
    tied.
    Raises ValueError for a model with quantized layers, whose indices have no gradient.
    """

    def __init__(self, config: FullFTConfig, injector: Injector, name: str) -> None:
        quantized = [path for path, module in injector.modules().items() if is_quantized(module)]
        if quantized:
            raise ValueError(
                f"FullFT: the model must be dense, got {len(quantized)} quantized layers ({quantized[0]}, ...): 4-bit "
                "indices have no gradient. Load it unquantized, or take an adapter method"
            )
        super().__init__(config, injector, name)

    def attach(self) -> None:
        super().attach()
        for path, module in self.injector.modules().items():
            for leaf in module._parameters:
                if module._parameters[leaf] is not None:
                    self.overrides.add(f"{path}.{leaf}" if path else leaf)

    def merge_unsupported(self) -> Literal[None]:
        return None
