"""BitFit: only the biases are trained.

Source: BitFit (arXiv:2106.10199).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ...nn.match import Names, check_names, matches
from ...nn.module_tree import output_embeddings_of
from ..core.config import PeftConfig
from ..framework.injector import Injector
from ..framework.method import Method
from ..framework.registry import register_method
from ..layers.base_layer import device_of, features, is_linear, weight_dtype


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(PeftConfig):
    """Configuration of BitFit.

    biases: "all", "query+mlp" (the paper's subset: the biases of the queries and of the FFN's first linear layer, half
    of all biases in BERT), or names of the modules whose biases train, matched as target_modules are.

    add_missing: adds a bias of zero to linear layers that have none (Llama has no biases). Without it, a model in which
    no bias would train is refused.
    """

    peft_type = "BITFIT"

    biases: Names = "all"
    add_missing: bool = False


@register_method(BitFitConfig)
class BitFit(Method):
    """Trained biases. Quantized layers have float biases too, so NF4 models need no special case."""

    config: BitFitConfig

    def __init__(self, config: BitFitConfig, injector: Injector, name: str) -> None:
        self.added: list[str] = []  # paths of the layers that had no bias
        super().__init__(config, injector, name)

    def attach(self) -> None:
        super().attach()
        config = self.config
        chosen = dict(self._chosen(config.biases))
        if config.add_missing:
            self._add_missing(chosen)
        with_bias = [path for path, module in chosen.items() if module._parameters.get("bias") is not None]
        if not with_bias:
            raise ValueError(
                f"BitFit: biases={config.biases!r} must name modules with a bias, and this model's have none; "
                "add_missing=True gives its linear layers one"
            )
        for path in with_bias:
            self.overrides.add(f"{path}.bias")

    @classmethod
    def check_names(cls, config: PeftConfig, injector: Injector) -> None:
        super().check_names(config, injector)
        assert isinstance(config, BitFitConfig)
        if config.biases not in ("all", "query+mlp"):
            able = [
                name
                for name, module in injector.modules().items()
                if module._parameters.get("bias") is not None or (config.add_missing and is_linear(module))
            ]
            kind = "a linear layer or a module with a bias" if config.add_missing else "a module with a bias"
            check_names("BitFit: biases", config.biases, able, of=kind)

    def _chosen(self, biases: Names) -> Iterator[tuple[str, nn.Module]]:
        modules = self.injector.modules()
        if biases == "query+mlp":
            for layer in self.injector.layout.layers:
                yield from ((path, modules[path]) for path in (layer.query, *layer.ffn_first))
            return
        for path, module in modules.items():
            # The parameter's own name decides, because T5's relative_attention_bias is an embedding.
            if biases == "all" or matches(biases, path):
                yield path, module

    def _add_missing(self, chosen: dict[str, nn.Module]) -> None:
        heads = {id(module) for path, module in chosen.items() if matches(self.config.heads, path)}
        output = output_embeddings_of(self.injector.model)
        default = self.injector.dtype()
        for path, module in chosen.items():
            if is_linear(module) and module.bias is None and module is not output and id(module) not in heads:
                dtype = weight_dtype(module, default)
                zeros = torch.zeros(features(module)[1], dtype=dtype, device=device_of(module))
                module.bias = nn.Parameter(zeros, requires_grad=False)
                self.added.append(path)

    def detach(self) -> None:
        super().detach()
        for path in self.added if not self.overrides.kept else ():
            self.injector.module(path).register_parameter("bias", None)

    def merge_unsupported(self) -> Literal[None]:
        return None
