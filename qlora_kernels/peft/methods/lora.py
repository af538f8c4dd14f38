"""LoRA: y = W x + scaling * B A dropout(x), A and B trained, W frozen; with rsLoRA, DoRA and its initialisations.

Source: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353). Names, defaults and files: PEFT's.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...nn.match import as_names
from ..core.config import PeftConfig
from ..framework.injector import Injector
from ..framework.linear_method import LinearMethod
from ..framework.method import tensors_by_path
from ..framework.registry import register_method
from ..framework.targets import check_pattern_names, matched_parameters, pattern_value
from ..framework.ties import paths_of_tied
from ..layers.base_layer import is_convolution, is_embedding
from ..layers.overridden_module import UPDATES
from ..layers.parameter_lora import ParameterDelta
from .lora_config import LoraConfig, starts_in_base
from .lora_conv import DoraConv, LoraConv
from .lora_embedding import DoraEmbedding, LoraEmbedding
from .lora_init import init_from_base, init_loftq, init_orthogonal
from .lora_layers import DoraLinear, LoraLinear
from .tied_lora import TransposedLora, same_tensors, shared
from .token_rows import add_named_token_rows


@register_method(LoraConfig)
class Lora(LinearMethod["LoraLinear | LoraEmbedding | TransposedLora"]):
    """LoRA updates of the targeted linear layers, embeddings, convolutions and parameters."""

    config: LoraConfig
    adapts_embeddings = True
    adapts_convolutions = True
    rank_tensors: ClassVar[dict[str, int]] = {"lora_A.weight": 0, "lora_embedding_A": 0}

    def __init__(self, config: PeftConfig, injector: Injector, name: str) -> None:
        super().__init__(config, injector, name)
        self.needs_eva = self.config.init_lora_weights == "eva"
        parameters = matched_parameters(injector, self.config.target_parameters)
        self.built_parameters = {path: (name, self._new_parameter_delta(path)) for path, name in parameters.items()}

    def attach(self) -> None:
        super().attach()
        built, self.built_parameters = self.built_parameters, {}
        for path, (stored_as, delta) in built.items():
            owner, _, attribute = path.rpartition(".")
            self.injector.adapt_parameter(path)
            self.tree.add(stored_as, delta, owner=owner, slot=f"{attribute}{UPDATES}")
        if tokens := self.config.trainable_token_indices:
            add_named_token_rows(self, tokens, tie=self.config.ensure_weight_tying)

    @classmethod
    def targets(cls, config: PeftConfig, injector: Injector) -> dict[str, nn.Module]:
        assert isinstance(config, LoraConfig)
        return {} if config.target_parameters and not config.target_modules else super().targets(config, injector)

    def _new_parameter_delta(self, path: str) -> ParameterDelta:
        owner = path.rpartition(".")[0]
        own, r = self.injector.own_value(path), self.rank(self.config, path)
        if len(own.shape) not in (2, 3) or not own.dtype.is_floating_point:
            raise ValueError(
                f"target_parameters: {path} must have two or three dimensions, got {list(own.shape)} in {own.dtype}"
            )
        if owner in self.deltas:
            raise ValueError(f"target_parameters: {path} must not belong to a layer that target_modules names")
        transposed = len(own.shape) == 3 and bool(getattr(self.injector.module(owner), "is_transposed", False))
        scaling = self.config.scaling(r, pattern_value(path, self.config.alpha_pattern, self.config.lora_alpha))
        init, dtype = self.config.init_lora_weights, self.injector.adapter_dtype
        return ParameterDelta(own, r, scaling, init, dtype, transposed=transposed)

    @classmethod
    def check_file(
        cls, config: PeftConfig, injector: Injector, tensors: dict[str, Tensor], extra_tensors: dict[str, Tensor]
    ) -> None:
        super().check_file(config, injector, tensors, extra_tensors)
        assert isinstance(config, LoraConfig)
        stored = tensors_by_path(tensors, cls.file_prefix)
        for path, stored_as in matched_parameters(injector, config.target_parameters).items():
            shape = injector.own_value(path).shape
            rows = cls.rank(config, path) * (shape[0] if len(shape) == 3 else 1)
            lora_A = stored.get(f"{stored_as}.lora_A.weight")
            if lora_A is None or lora_A.shape[:1] != (rows,):
                got = "none" if lora_A is None else list(lora_A.shape)
                raise ValueError(f"adapter file: {stored_as}.lora_A.weight of {path} must have {rows} rows, got {got}")

    def row_mixing_unsupported(self) -> str | None:
        if self.config.target_parameters:
            return f"it updates parameters for the whole batch, {list(as_names(self.config.target_parameters))}"
        return super().row_mixing_unsupported()

    @classmethod
    def check_names(cls, config: PeftConfig, injector: Injector) -> None:
        super().check_names(config, injector)
        assert isinstance(config, LoraConfig)
        if config.rank_pattern or config.alpha_pattern:
            targets = [*cls.targets(config, injector), *matched_parameters(injector, config.target_parameters)]
            check_pattern_names("rank_pattern", config.rank_pattern, targets)
            check_pattern_names("alpha_pattern", config.alpha_pattern, targets)

    @classmethod
    def rank(cls, config: PeftConfig, path: str) -> int:
        assert isinstance(config, LoraConfig)
        return int(pattern_value(path, config.rank_pattern, config.r))

    @classmethod
    def config_of_file(cls, config: PeftConfig) -> PeftConfig:
        """Return the configuration with which a file is loaded.

        Each time PEFT loads a PiSSA or OLoRA file, it subtracts the start values from the base's weights; here the
        fixed pair has this effect. A file of LoftQ is refused, because its base is not in the file.
        Raises NotImplementedError for a file of LoftQ.
        """
        assert isinstance(config, LoraConfig)
        if config.init_lora_weights == "loftq":
            raise NotImplementedError(
                "adapter_config.json: init_lora_weights is 'loftq': the adapter fits a base that LoftQ quantized, "
                "which is not in the file; load that base and set init_lora_weights to true in the file"
            )
        if str(config.init_lora_weights).startswith("pissa_niter_"):
            warnings.warn(
                "adapter_config.json: the start of 'pissa_niter_<n>' is a random approximation, which loading repeats "
                "with other random numbers, here as in PEFT; outputs may differ a little from those of training",
                stacklevel=7,
            )
        return config if starts_in_base(config.init_lora_weights) else config.replace(init_lora_weights=True)

    def new_delta(self, path: str, base: nn.Module) -> LoraLinear | LoraEmbedding | TransposedLora:
        delta: Any = self._own_delta(path, base)
        if (first := self._first_tied(path)) is not None:
            delta = shared(delta, self.deltas[first], path)
        how = str(self.config.init_lora_weights)
        if starts_in_base(how) and isinstance(delta, LoraLinear):
            init_from_base(delta, base, how)
        return cast("LoraLinear | LoraEmbedding | TransposedLora", delta)

    def _own_delta(self, path: str, base: nn.Module) -> LoraLinear | LoraEmbedding:
        config, r = self.config, self.rank(self.config, path)
        scaling = config.scaling(r, pattern_value(path, config.alpha_pattern, config.lora_alpha))
        kinds = (LoraConv, DoraConv) if is_convolution(base) else (LoraLinear, DoraLinear)
        kind = ((LoraEmbedding, DoraEmbedding) if is_embedding(base) else kinds)[config.use_dora]
        delta: LoraLinear | LoraEmbedding = kind(base, r, scaling, config, self.injector.adapter_dtype)
        if config.init_lora_weights == "orthogonal" and isinstance(delta, LoraLinear):
            init_orthogonal(delta)
        return delta

    def _first_tied(self, path: str) -> str | None:
        """Return the first adapted layer that shares its weight with the layer at `path`, if they must share one
        update.
        """
        if not self.config.ensure_weight_tying:
            return None
        tied = paths_of_tied(self.injector.modules(aliases=True)).get(f"{path}.weight", ())
        earlier = itertools.takewhile(lambda other: other != path, self.deltas)
        return next((other for other in earlier if f"{other}.weight" in tied), None)

    def add_delta(self, path: str, delta: LoraLinear | LoraEmbedding | TransposedLora) -> None:
        super().add_delta(path, delta)
        if self.config.init_lora_weights == "loftq" and isinstance(delta, LoraLinear):
            # The base is replaced layer by layer, so that no second copy of the model is in memory.
            layer = self.injector.adapt(path)
            layer.base_layer = init_loftq(delta, layer.base_layer, path, **self.config.loftq_config)

    def merge_unsupported(self) -> str | None:
        grouped = [path for path, delta in self.deltas.items() if isinstance(delta, LoraConv) and delta.groups > 1]
        return (
            f"{grouped[0]} is a convolution with groups, whose A mixes the channels of all groups" if grouped else None
        )

    def before_save(self) -> None:
        if self.needs_eva:
            raise RuntimeError("LoRA: initialize_eva(model, batches) must be called before training with 'eva'")

    def file_config(self) -> dict[str, Any]:
        config = self.config.replace(init_lora_weights=True, loftq_config={})
        if any(self._first_tied(path) for path in self.deltas):
            config = config.replace(target_modules=list(self.deltas))
        if not starts_in_base(self.config.init_lora_weights):
            return {**config.to_dict(), "inference_mode": True}
        # The trained and the subtracted pair, concatenated, are a LoRA of twice the rank with the same scaling and
        # base.
        alpha = math.sqrt(2) if config.use_rslora else 2
        doubled = config.replace(
            r=2 * config.r,
            lora_alpha=alpha * config.lora_alpha,
            rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
            alpha_pattern={key: alpha * a for key, a in config.alpha_pattern.items()},
        )
        return {**doubled.to_dict(), "inference_mode": True}

    def extras(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.config.init_lora_weights != "loftq" or self.config.loftq_config.get("loftq_iter", 1) == 1:
            return {}, {}
        # From the second iteration on, the base is NF4(W - B A), which cannot be recomputed and is therefore saved.
        layers = {path: self.injector.module(path) for path in self.deltas}
        return {}, {f"{path}.{key}": value for path, m in layers.items() for key, value in m.state_dict().items()}

    def load_extras(self, values: dict[str, Any], tensors: dict[str, Tensor], *, is_trainable: bool) -> None:
        for path in self.deltas if tensors else ():
            own = {k.removeprefix(f"{path}."): v for k, v in tensors.items() if k.startswith(f"{path}.")}
            self.injector.module(path).load_state_dict(own)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        # A file of PEFT holds only the trained pair; the fixed pair was computed from the base when the method was
        # built.
        fixed = {k: v for k, v in self.state_dict().items() if k.endswith((".fixed_A", ".fixed_B"))}
        stored = tensors_by_path(tensors, self.file_prefix)
        self._untie_different(stored)
        self.fill({**stored, **fixed})

    def _untie_different(self, stored: dict[str, Tensor]) -> None:
        """Give layers that share a weight parameters of their own if the file has different updates for them."""

        def update(path: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{path}."): t for key, t in stored.items() if key.startswith(f"{path}.")}

        for path, place in self.tree.places.items() if self.config.ensure_weight_tying else ():
            first = self._first_tied(path)
            if first is not None and not same_tensors(update(path), update(first)):
                self.injector.slot(place.owner, place.slot)[place.key] = self._own_delta(
                    path, self.injector.module(path)
                )

    def tensors(self) -> dict[str, Tensor]:
        tensors = super().tensors()
        for factor, dim in (("A", 0), ("B", 1)):
            for key in [k for k in tensors if k.endswith(f".fixed_{factor}")]:
                trained = key.replace(f"fixed_{factor}", f"lora_{factor}.weight")
                tensors[trained] = torch.cat([tensors[trained], tensors.pop(key)], dim=dim)
        return tensors
