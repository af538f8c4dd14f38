"""LoRA: y = W x + scaling * B A dropout(x), A and B trained, W frozen; with rsLoRA, DoRA and its initialisations.

Source: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353). Names, defaults and files: PEFT's.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.match import as_names
from ..core.config import PeftConfig
from ..core.offloaded import has_hooks, weight_of
from ..framework.injector import Injector
from ..framework.linear_method import LinearMethod
from ..framework.method import tensors_by_path
from ..framework.registry import register_method
from ..framework.targets import check_pattern_names, matched_parameters, pattern_value
from ..framework.ties import paths_of_tied
from ..layers.adapted_linear import Delta
from ..layers.base_layer import dense_weight, device_of, features, is_embedding
from ..layers.overridden_module import UPDATES
from ..layers.parameter_lora import ParameterDelta
from .lora_embedding import LoraEmbedding
from .lora_init import init_from_base, init_loftq, init_orthogonal, starts_in_base
from .tied_lora import TransposedLora, same_tensors, shared


@dataclass(frozen=True, kw_only=True)
class LoraConfig(PeftConfig):
    """Fields, names and defaults of PEFT's LoraConfig.

    init_lora_weights: True (A Kaiming uniform, B zero: identity), "gaussian" (A normal of std 1/r, B zero: identity),
    "orthogonal" (random, the rows of A orthogonal to the columns of B in the r dimensions: identity; r must be even),
    "pissa" or "pissa_niter_<n>" (the principal part of W), "olora" (the first part of W's QR decomposition), "loftq"
    (quantizes a dense base and fits the error), "eva" (A from the layer's inputs: initialize_eva fills it in), False
    (both Kaiming: not identity).   loftq_config: {"loftq_iter": n}.
    lora_bias: B has a bias, which is scaled and merged with it.
    ensure_weight_tying: layers that share a weight, such as the head and the embedding, train as one. It holds for
    modules_to_save and for target_modules: one LoRA for all of them, which the head has transposed.
    target_parameters: names, or endings of names, of parameters that a module multiplies by itself, such as the
    [experts, out, in] weights of a mixture of experts, dense or ExpertsNF4; with it, None or [] as target_modules means
    no layers.
    target_modules may also name an nn.Embedding: its LoRA is that of a linear layer of one-hot tokens.
    """

    peft_type = "LORA"

    r: int = 8
    target_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    exclude_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | tuple[int, ...] | int | None = None
    layers_pattern: list[str] | tuple[str, ...] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    loftq_config: dict[str, Any] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    target_parameters: list[str] | tuple[str, ...] | set[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ValueError(f"LoraConfig: r must be >= 1, got {self.r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"LoraConfig: lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"LoraConfig: bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        init = self.init_lora_weights
        if isinstance(self.target_parameters, str):
            object.__setattr__(self, "target_parameters", (self.target_parameters,))
        if self.target_parameters:
            for option, allowed in (("lora_dropout", 0.0), ("use_dora", False), ("lora_bias", False)):
                if getattr(self, option) != allowed:
                    raise ValueError(
                        f"LoraConfig: {option} must be {allowed} with target_parameters, got {getattr(self, option)}"
                    )
            if init not in (True, False, "gaussian", "eva"):
                raise ValueError(
                    f"LoraConfig: init_lora_weights must be a bool or 'gaussian' with target_parameters, got {init!r}"
                )
        known = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")
        if not isinstance(init, bool) and init not in known and not re.fullmatch(r"pissa_niter_\d+", init):
            raise ValueError(
                f"LoraConfig: init_lora_weights must be a bool, 'pissa_niter_<n>' or one of {known}, got {init!r}"
            )
        if self.use_dora and starts_in_base(init):
            raise ValueError(f"LoraConfig: use_dora must be False with init_lora_weights={init!r}")
        if init == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError(f"LoraConfig: r must be even with init_lora_weights='orthogonal', got {self.r}")
        if self.lora_bias and (self.use_dora or not isinstance(init, bool)):
            raise ValueError(
                "LoraConfig: lora_bias must be False with use_dora or another init_lora_weights than a bool"
            )

    def scaling(self, r: int, alpha: float) -> float:
        return alpha / (math.sqrt(r) if self.use_rslora else r)


class LoraLinear(Delta):
    """lora_A.weight [r, K], lora_B.weight [N, r]; the update is scaling * B A.

    `fixed_A` [r, K], `fixed_B` [N, r], where present, are a second, untrained pair: the part that PiSSA and OLoRA take
    out of W.
    """

    fixed_A: Tensor | None
    fixed_B: Tensor | None

    def __init__(self, base: nn.Module, r: int, scaling: float, config: LoraConfig, dtype: torch.dtype) -> None:
        super().__init__()
        k, n = features(base)
        device = device_of(base)
        self.lora_A = nn.Linear(k, r, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(r, n, bias=config.lora_bias, device=device, dtype=dtype)
        self.r, self.scaling, self.dropout_p = r, scaling, config.lora_dropout
        self.register_buffer("fixed_A", None)
        self.register_buffer("fixed_B", None)
        self._init(config.init_lora_weights)

    def _init(self, how: bool | str) -> None:
        if how is False:
            return  # nn.Linear's own, Kaiming uniform for both
        if how == "orthogonal":
            init_orthogonal(self)
            return
        if how == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / self.r)
        nn.init.zeros_(self.lora_B.weight)
        if self.lora_B.bias is not None:
            nn.init.zeros_(self.lora_B.bias)

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        self.lora_A.weight.data.copy_(lora_A)
        self.lora_B.weight.data.copy_(lora_B)

    def offset(self) -> Tensor | None:
        return None if self.lora_B.bias is None else self.scaling * weight_of(self.lora_B, "bias")

    def lowrank(self) -> tuple[Tensor, Tensor, float]:
        lora_A, lora_B = self.lora_A.weight, self.lora_B.weight
        if lora_A.is_meta or lora_B.is_meta:
            lora_A, lora_B = weight_of(self.lora_A, "weight"), weight_of(self.lora_B, "weight")
        fixed_A, fixed_B = self._buffers["fixed_A"], self._buffers["fixed_B"]
        if fixed_A is not None and fixed_B is not None:
            lora_A, lora_B = torch.cat([lora_A, fixed_A]), torch.cat([lora_B, fixed_B], dim=1)
        return lora_A, lora_B, self.scaling

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        # Hooks act where layers are called, and FSDP wraps layers in others.
        lora_A, lora_B = self.lora_A, self.lora_B
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear or has_hooks(self, lora_A, lora_B):
            return None
        return self.lowrank()

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        dropped = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout_p, self.training)
        update = self.lora_B(self.lora_A(dropped))
        if self.fixed_A is not None and self.fixed_B is not None:
            update = update + F.linear(F.linear(dropped, self.fixed_A), self.fixed_B)
        updated: Tensor = y + self.scaling * update
        return updated.to(y.dtype)


class DoraLinear(LoraLinear):
    """W' = m * V / |V|_row, V = W + scaling * B A; m = lora_magnitude_vector [N] starts as |W|_row: identity.

    |V|_row is a constant for the gradient (DoRA section 4.3). A row of V that is zero has no direction: it stays as it
    is, with no factor, until B gives it one. With dropout, PEFT drops x in the W part of the update as well; here W x
    is the layer's own output, computed once.
    """

    def __init__(self, base: nn.Module, r: int, scaling: float, config: LoraConfig, dtype: torch.dtype) -> None:
        super().__init__(base, r, scaling, config, dtype)
        self.lora_magnitude_vector = nn.Parameter(dense_weight(base).norm(dim=1).to(dtype))

    def factors(self) -> None:
        return None

    def _row_scale(self, weight: Tensor) -> Tensor:
        lora_A, lora_B, scaling = self.lowrank()
        norm = (weight + scaling * (lora_B.detach().float() @ lora_A.detach().float())).norm(dim=1)
        magnitude = weight_of(self, "lora_magnitude_vector")
        norm = norm.to(magnitude.dtype)
        zero = norm == 0
        scale: Tensor = magnitude / norm.masked_fill(zero, 1.0)
        return scale.masked_fill(zero, 1.0)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        lora_A, lora_B, scaling = self.lowrank()
        scale = self._row_scale(dense_weight(base))
        dropped = F.dropout(x.to(lora_A.dtype), self.dropout_p, self.training)
        update = F.linear(F.linear(dropped, lora_A), lora_B) * scaling
        without_bias = y if base.bias is None else y - cast(Tensor, base.bias)
        return (y + (scale - 1) * without_bias + scale * update).to(y.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        return self._row_scale(weight).detach().float()[:, None] * super().merged(weight)

    def updated(self, weight: Tensor) -> Tensor:
        return (self._row_scale(weight.detach().float())[:, None] * super().updated(weight)).to(weight.dtype)


@register_method(LoraConfig)
class Lora(LinearMethod["LoraLinear | LoraEmbedding | TransposedLora"]):
    """LoRA over the linear layers and embeddings that the configuration targets."""

    config: LoraConfig
    adapts_embeddings = True
    rank_tensors: ClassVar[dict[str, int]] = {"lora_A.weight": 0, "lora_embedding_A": 0}

    def __init__(self, config: PeftConfig, injector: Injector, name: str) -> None:
        super().__init__(config, injector, name)
        self.needs_eva = self.config.init_lora_weights == "eva"
        for path, stored_as in matched_parameters(injector, self.config.target_parameters).items():
            self._add_parameter(path, stored_as)

    @classmethod
    def targets(cls, config: PeftConfig, injector: Injector) -> dict[str, nn.Module]:
        assert isinstance(config, LoraConfig)
        return {} if config.target_parameters and not config.target_modules else super().targets(config, injector)

    def _add_parameter(self, path: str, stored_as: str) -> None:
        owner, _, attribute = path.rpartition(".")
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
        self.injector.adapt_parameter(path)
        delta = ParameterDelta(own, r, scaling, init, dtype, transposed=transposed)
        self.tree.add(stored_as, delta, owner=owner, slot=f"{attribute}{UPDATES}")

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
        """PEFT takes the start values of PiSSA and OLoRA out of the base's weights each time it loads such a file; here
        the fixed pair stands for that. LoftQ's base is not in the file.
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
                stacklevel=6,
            )
        return config if starts_in_base(config.init_lora_weights) else config.replace(init_lora_weights=True)

    def new_delta(self, path: str, base: nn.Module) -> LoraLinear | LoraEmbedding | TransposedLora:
        delta = self._own_delta(path, base)
        first = self._first_tied(path)
        return delta if first is None else cast(Any, shared(delta, self.deltas[first], path))

    def _own_delta(self, path: str, base: nn.Module) -> LoraLinear | LoraEmbedding:
        config, r = self.config, self.rank(self.config, path)
        scaling = config.scaling(r, pattern_value(path, config.alpha_pattern, config.lora_alpha))
        kind = LoraEmbedding if is_embedding(base) else DoraLinear if config.use_dora else LoraLinear
        return kind(base, r, scaling, config, self.injector.adapter_dtype)

    def _first_tied(self, path: str) -> str | None:
        """The first adapted layer with the weight of the layer at `path`, where they are to train as one."""
        if not self.config.ensure_weight_tying:
            return None
        tied = paths_of_tied(self.injector.modules(aliases=True)).get(f"{path}.weight", ())
        earlier = itertools.takewhile(lambda other: other != path, self.deltas)
        return next((other for other in earlier if f"{other}.weight" in tied), None)

    def add_delta(self, path: str, delta: LoraLinear | LoraEmbedding | TransposedLora) -> None:
        super().add_delta(path, delta)
        if not isinstance(delta, LoraLinear):
            return
        layer, how = self.injector.adapt(path), str(self.config.init_lora_weights)
        if starts_in_base(how):
            init_from_base(delta, layer.base_layer, how)
        elif how == "loftq":
            layer.base_layer = init_loftq(delta, layer.base_layer, path, **self.config.loftq_config)

    def before_save(self) -> None:
        if self.needs_eva:
            raise RuntimeError("LoRA: initialize_eva(model, batches) must be called before training with 'eva'")

    def file_config(self) -> dict[str, Any]:
        config = self.config.replace(init_lora_weights=True, loftq_config={})
        if any(self._first_tied(path) for path in self.deltas):
            config = config.replace(target_modules=list(self.deltas))
        if not starts_in_base(self.config.init_lora_weights):
            return {**config.to_dict(), "inference_mode": True}
        # Trained and taken-out parts side by side are a LoRA of twice the rank at the same scaling, over the same base.
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
        # From the second iteration on, the base is NF4(W - B A), which nothing but this file can give back.
        layers = {path: self.injector.module(path) for path in self.deltas}
        return {}, {f"{path}.{key}": value for path, m in layers.items() for key, value in m.state_dict().items()}

    def load_extras(self, values: dict[str, Any], tensors: dict[str, Tensor], *, is_trainable: bool) -> None:
        for path in self.deltas if tensors else ():
            own = {k.removeprefix(f"{path}."): v for k, v in tensors.items() if k.startswith(f"{path}.")}
            self.injector.module(path).load_state_dict(own)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        # A file of PEFT's holds the trained pair alone: the fixed one was computed from the base a moment ago.
        fixed = {k: v for k, v in self.state_dict().items() if k.endswith((".fixed_A", ".fixed_B"))}
        stored = tensors_by_path(tensors, self.file_prefix)
        self._untie_different(stored)
        self.fill({**stored, **fixed})

    def _untie_different(self, stored: dict[str, Tensor]) -> None:
        """Gives layers that share a weight, and of which a file has different updates, parameters of their own."""

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
