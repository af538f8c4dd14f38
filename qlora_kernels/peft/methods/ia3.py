"""IA3: trained vectors scale the outputs of attention layers and the inputs of feed-forward layers.

Source: IA3 (arXiv:2205.05638). Names, defaults and files: PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.config import PeftConfig
from ..core.offloaded import weight_of
from ..framework.injector import Injector
from ..framework.linear_method import LinearMethod
from ..framework.registry import register_method
from ..framework.targets import is_all_linear
from ..layers.base_layer import device_of, features
from ..layers.delta import Delta

# PEFT's defaults of (target_modules, feedforward_modules) -> the model types that they are for.
_DEFAULTS: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {
    (("k_proj", "v_proj", "down_proj"), ("down_proj",)): "llama mistral",
    (("q_proj", "v_proj", "down_proj"), ("down_proj",)): "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
    (("k_proj", "v_proj", "w2"), ("w2",)): "mixtral",
    (("key", "value", "output.dense"), ("output.dense",)): "bert roberta",
    (("key_proj", "value_proj", "output.dense"), ("output.dense",)): "deberta-v2",
    (("in_proj", "output.dense"), ("output.dense",)): "deberta",
    (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)): "gpt2 gpt_bigcode",
    (("q_proj", "v_proj", "fc_out"), ("fc_out",)): "gptj",
    (("q_proj", "v_proj", "c_proj"), ("c_proj",)): "gpt_neo",
    (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)): "gpt_neox falcon RefinedWeb RefinedWebModel",
    (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)): "bloom",
    (("q_proj", "k_proj", "fc2"), ("fc2",)): "opt",
    (("q_proj", "v_proj", "fc2"), ("fc2",)): "bart phi",
    (("k", "v", "wo"), ("wo",)): "t5",
    (("k", "v", "wi_1"), ()): "mt5",
}


@dataclass(frozen=True, kw_only=True)
class IA3Config(PeftConfig):
    """Configuration of IA3, with the fields, names and defaults of PEFT's IA3Config.

    feedforward_modules: the target_modules whose input is scaled instead of the output, as endings of names or as a
    regular expression. If it or target_modules is None, PEFT's default for the model type is used.
    init_ia3_weights: True (ones: identity) or False (normal).
    Raises ValueError, naming the field, for feedforward_modules that are not among target_modules.
    """

    peft_type = "IA3"
    layers_to_transform: ClassVar[None] = None
    layers_pattern: ClassVar[None] = None

    target_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    exclude_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    feedforward_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        targets, feedforward = self.target_modules, self.feedforward_modules
        if targets is None or feedforward is None or isinstance(targets, str) or isinstance(feedforward, str):
            return
        if beside := sorted(item for item in feedforward if not any(target.endswith(item) for target in targets)):
            raise ValueError(f"IA3Config: feedforward_modules must be some of target_modules, got {beside} beside them")

    def scales_input(self, path: str) -> bool:
        """Return whether the layer at `path` matches feedforward_modules, by PEFT's rule for names."""
        modules = self.feedforward_modules or ()
        if isinstance(modules, str):
            return re.fullmatch(modules, path) is not None
        return any(path.endswith(ending) for ending in modules)


class IA3Linear(Delta):
    """Trained vector ia3_l that multiplies the output (shape [N, 1]) or the input (shape [1, K]) of the layer."""

    def __init__(self, base: nn.Module, scales_input: bool, init: bool, dtype: torch.dtype) -> None:
        super().__init__()
        k, n = features(base)
        make = torch.ones if init else torch.randn
        self.acts_on_input = scales_input
        self.ia3_l = nn.Parameter(make((1, k) if scales_input else (n, 1), device=device_of(base), dtype=dtype))

    def _vector(self) -> Tensor:
        return weight_of(self, "ia3_l").flatten()

    def prepare_input(self, x: Tensor) -> Tensor:
        return (x * self._vector()).to(x.dtype) if self.acts_on_input else x

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        return y if self.acts_on_input else (y * self._vector()).to(y.dtype)

    def merged(self, weight: Tensor, base: nn.Module) -> Tensor:
        return self.updated(weight, base).detach()

    def updated(self, weight: Tensor, base: nn.Module) -> Tensor:
        return (weight * weight_of(self, "ia3_l")).to(weight.dtype)

    def updated_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.acts_on_input else (bias * self._vector()).to(bias.dtype)


@register_method(IA3Config)
class IA3(LinearMethod[IA3Linear]):
    """One trained vector for each targeted linear layer."""

    config: IA3Config

    def __init__(self, config: PeftConfig, injector: Injector, name: str) -> None:
        config = _completed(config, injector)
        if is_all_linear(config.target_modules):
            # PEFT loads only files whose feedforward_modules is a subset of target_modules, so both are listed by path.
            layers = super().targets(config, injector)
            scaled = [path for path in layers if config.scales_input(path)]
            config = config.replace(target_modules=list(layers), feedforward_modules=scaled)
        super().__init__(config, injector, name)

    @classmethod
    def check_names(cls, config: PeftConfig, injector: Injector) -> None:
        super().check_names(_completed(config, injector), injector)

    @classmethod
    def targets(cls, config: PeftConfig, injector: Injector) -> dict[str, nn.Module]:
        return super().targets(_completed(config, injector), injector)

    def new_delta(self, path: str, base: nn.Module) -> IA3Linear:
        config = self.config
        return IA3Linear(base, config.scales_input(path), config.init_ia3_weights, self.injector.adapter_dtype)


@torch.no_grad()
def weighted_ia3(parts: Sequence[IA3], weights: Sequence[float]) -> tuple[IA3Config, dict[str, Tensor]]:
    """Return the configuration and vectors of the weighted sum of IA3 adapters, as PEFT computes it.

    In a layer that only some of the adapters have, the sum is taken over these.
    Raises ValueError for adapters that train other parameters too, and if one adapter scales a layer's input and
    another its output.
    """
    if len(parts) != len(weights):
        raise ValueError(f"add_weighted_adapter: weights must be one per adapter, got {len(weights)} for {len(parts)}")
    vectors: dict[str, Tensor] = {}
    for part, weight in zip(parts, weights, strict=True):
        if part.overrides.paths:
            raise ValueError(
                f"add_weighted_adapter: adapter {part.name!r} must not replace {min(part.overrides.paths)} "
                "(modules_to_save), since trained copies are no vectors that add up; merge it instead"
            )
        for path, delta in part.deltas.items():
            vector = weight * weight_of(delta, "ia3_l").detach()
            if path in vectors and vectors[path].shape != vector.shape:
                raise ValueError(
                    f"add_weighted_adapter: adapters must all scale the input of {path}, or all its output"
                )
            vectors[path] = vectors[path] + vector if path in vectors else vector
    scaled = [path for part in parts for path, delta in part.deltas.items() if delta.acts_on_input]
    changes = {"target_modules": list(vectors), "feedforward_modules": list(dict.fromkeys(scaled))}
    return parts[0].config.replace(exclude_modules=None, **changes), vectors


def _completed(config: PeftConfig, injector: Injector) -> IA3Config:
    """Return `config` with fields that are None set to PEFT's names for this type of model.

    Raises ValueError if PEFT has no names for this type of model.
    """
    assert isinstance(config, IA3Config)
    missing = [name for name in ("target_modules", "feedforward_modules") if getattr(config, name) is None]
    if not missing:
        return config
    model_type = getattr(getattr(injector.model, "config", None), "model_type", None)
    for (targets, feedforward), model_types in _DEFAULTS.items():
        if model_type in model_types.split():
            defaults = {"target_modules": list(targets), "feedforward_modules": list(feedforward)}
            return config.replace(**{name: defaults[name] for name in missing})
    raise ValueError(
        f"{' and '.join(missing)}: must be given for a model of type {model_type or type(injector.model).__name__!r}"
    )
