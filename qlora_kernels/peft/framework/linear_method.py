"""LinearMethod: the base of methods that update each linear layer that the configuration targets."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import ClassVar, Generic, TypeVar, cast

from torch import Tensor, nn

from ...nn.linear_nf4 import is_conv1d
from ..attention.torch_attention import SplitAttention
from ..core.config import PeftConfig
from ..layers.delta import Delta
from .injector import Injector
from .method import Method, tensors_by_path
from .targets import TargetConfig, called_instead, check_target_names, is_all_linear, matched_layers, matched_parameters

D = TypeVar("D", bound=Delta)


class LinearMethod(Method, Generic[D]):
    """An update of each targeted layer, built by new_delta; each is a child of the AdaptedLinear that replaces its
    layer.
    """

    loads_in_peft = True
    adapts_embeddings: ClassVar[bool] = False
    adapts_convolutions: ClassVar[bool] = False
    rank_tensors: ClassVar[dict[str, int]] = {}
    """Names of an update's tensors in a file -> the dimension that equals the rank; empty if the rank needs no
    check.
    """

    def __init__(self, config: PeftConfig, injector: Injector, name: str) -> None:
        where = cast(TargetConfig, config)
        targets = self.targets(config, injector)
        if where.target_modules is None or is_all_linear(where.target_modules):
            config = config.replace(target_modules=list(targets))
        if hasattr(config, "fan_in_fan_out"):
            config = config.replace(fan_in_fan_out=any(map(is_conv1d, targets.values())))
        super().__init__(config, injector, name)
        self.built: dict[str, D] = {}
        """Name of a layer -> its update, until attach() adds them to the model."""
        self.weights_read: set[str] = set()
        """Names of the layers with whose weight the model's own code may compute."""
        for path, base in targets.items():
            self.built[path] = self.new_delta(path, base)

    def attach(self) -> None:
        super().attach()
        built, self.built = self.built, {}
        self.weights_read = self.injector.weights_read(built)
        for path, delta in built.items():
            self.add_delta(path, delta)
        self._add_biases(getattr(self.config, "bias", "none"))

    @classmethod
    def check_names(cls, config: PeftConfig, injector: Injector) -> None:
        super().check_names(config, injector)
        where = cast(TargetConfig, config)
        check_target_names(injector, where)
        _check_called(injector, cls.targets(config, injector))
        adapted = matched_parameters(injector, getattr(config, "target_parameters", None))
        left_out = [path for path in injector.expert_stacks() if path not in adapted]
        if is_all_linear(where.target_modules) and left_out:
            warnings.warn(
                f"target_modules: 'all-linear' leaves out {len(left_out)} expert weights that are no linear layers "
                f"({left_out[0]}, ...): they get no adapter; LoRA's target_parameters adapts them",
                stacklevel=4,
            )

    @classmethod
    def targets(cls, config: PeftConfig, injector: Injector) -> dict[str, nn.Module]:
        """Return the targeted layers by name."""
        return matched_layers(
            injector,
            cast(TargetConfig, config),
            embeddings=cls.adapts_embeddings,
            convolutions=cls.adapts_convolutions,
        )

    @classmethod
    def rank(cls, config: PeftConfig, path: str) -> int:
        """Return the rank of the update of the layer at `path`."""
        raise NotImplementedError

    @classmethod
    def fitted_to_file(cls, config: PeftConfig, injector: Injector, tensors: dict[str, Tensor]) -> PeftConfig:
        """Exclude the projections of torch's attention that the file lacks: PEFT sees them as one packed weight."""
        stored = tensors_by_path(tensors, cls.file_prefix)
        packed = {name for name, module in injector.modules().items() if isinstance(module, SplitAttention)}
        absent = [
            path
            for path in (cls.targets(config, injector) if packed else ())
            if path.rpartition(".")[0] in packed and not any(key.startswith(f"{path}.") for key in stored)
        ]
        if not absent:
            return config
        excluded = cast(TargetConfig, config).exclude_modules
        if isinstance(excluded, str):
            return config.replace(exclude_modules="|".join([f"(?:{excluded})", *map(re.escape, absent)]))
        return config.replace(exclude_modules=[*(excluded or ()), *absent])

    @classmethod
    def check_file(
        cls, config: PeftConfig, injector: Injector, tensors: dict[str, Tensor], extra_tensors: dict[str, Tensor]
    ) -> None:
        if not cls.rank_tensors:
            return
        stored = tensors_by_path(tensors, cls.file_prefix)
        for path in cls.targets(config, injector):
            keys = {f"{path}.{leaf}": dim for leaf, dim in cls.rank_tensors.items()}
            found = [(stored[key], dim) for key, dim in keys.items() if key in stored]
            if not found:
                first = next(iter(cls.rank_tensors)).partition(".")[0]
                raise ValueError(
                    f"adapter file: must hold the tensors of all targets, got one missing the {first} of {path}, which "
                    "adapter_config.json targets; load it over the model that it was trained on, or save it again"
                )
            tensor, dim = found[0]
            if tensor.shape[dim : dim + 1] != (cls.rank(config, path),):
                raise ValueError(
                    f"adapter_config.json: the rank of {path} must be that of its tensors, of shape "
                    f"{list(tensor.shape)}, got {cls.rank(config, path)}"
                )

    def new_delta(self, path: str, base: nn.Module) -> D:
        """Build the update of the layer `base` at `path`; `deltas` holds those of the layers before it."""
        raise NotImplementedError

    @property
    def deltas(self) -> dict[str, D]:
        """Return the updates by the names of their layers."""
        own = (path for path, place in self.tree.places.items() if place.slot == "deltas" and place.owner == path)
        return self.built or {path: cast(D, self.tree[path]) for path in own}

    def add_delta(self, path: str, delta: D) -> None:
        """Add an update to the layer at `path`.

        Raises ValueError if this adapter updates the layer already.
        """
        if self.name in self.injector.adapt(path, path in self.weights_read).deltas:
            raise ValueError(f"add_adapter: adapter {self.name!r} must update {path} once, got a second update of it")
        self.tree.add(path, delta, owner=path, slot="deltas")

    def _add_biases(self, which: str) -> None:
        """Train biases. which: "none", "all", or "<method>_only" for those of the adapted layers."""
        if which == "none":
            return
        deltas = self.deltas
        for owner, module in self.injector.modules().items():
            adapted = owner in deltas
            if module._parameters.get("bias") is not None and (adapted or which == "all"):
                # PEFT's name of the bias of a wrapped layer
                stored_as = f"{owner}.base_layer.bias" if adapted else None
                self.overrides.add(f"{owner}.bias", stored_as=stored_as)

    def merge_unsupported(self) -> str | None:
        return None


def _check_called(injector: Injector, targets: Iterable[str]) -> None:
    """Raise ValueError for an embedding whose table other embeddings use, because models call those instead."""
    for path in targets:
        if called := called_instead(injector, path):
            raise ValueError(
                f"target_modules: {path} must be called by the model, which calls {', '.join(called)} over its table; "
                "name those"
            )
