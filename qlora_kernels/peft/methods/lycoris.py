"""Shared parts of LoHa and LoKr: fields, rank patterns, and the two kinds of dropout of the LyCORIS library.

Source: LyCORIS (arXiv:2309.14859). Names, defaults and files: PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..core.config import PeftConfig
from ..framework.injector import Injector
from ..framework.linear_method import LinearMethod
from ..framework.targets import check_pattern_names, pattern_value
from ..layers.delta import Delta


@dataclass(frozen=True, kw_only=True)
class LycorisConfig(PeftConfig):
    """Fields that PEFT's LoHaConfig and LoKrConfig share.

    Raises ValueError, naming the field, for a rank below 1 or a dropout outside [0, 1).
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    exclude_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    layers_to_transform: list[int] | tuple[int, ...] | int | None = None
    layers_pattern: list[str] | tuple[str, ...] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if min(self.r, *self.rank_pattern.values(), self.r) < 1:
            raise ValueError(f"{name}: r must be >= 1, got {self.r} and rank_pattern {self.rank_pattern}")
        for option in ("rank_dropout", "module_dropout"):
            if not 0.0 <= getattr(self, option) < 1.0:
                raise ValueError(f"{name}: {option} must be in [0, 1), got {getattr(self, option)}")


class LycorisDelta(Delta):
    """Update scaling * product, with the dropout of LyCORIS in training; a subclass computes the product."""

    rank_dropout_scale: bool

    def __init__(self, scaling: float, config: LycorisConfig) -> None:
        super().__init__()
        self.scaling = scaling
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors, also in a replica of the layer, whose factors are attributes and not parameters."""
        raise NotImplementedError

    def update(self) -> Tensor:
        """Return the update of the weight, [N, K]."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """Return x [..., K] times the update, [..., N]."""
        raise NotImplementedError

    @property
    def drops(self) -> bool:
        """Whether this call drops a part of the update."""
        return self.training and (self.rank_dropout > 0 or self.module_dropout > 0)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        part = self.product(x.to(self.dtype))
        if self.drops:
            part = part * self._mask(part)
        return (y + part).to(y.dtype)

    def _mask(self, part: Tensor) -> Tensor:
        """Return the mask [N], from PEFT's random numbers in PEFT's order, on the device of `part`."""
        here = torch.rand(1, device=part.device) > self.module_dropout
        if not self.rank_dropout:
            return here.to(part.dtype)
        n = part.shape[-1]
        kept = (torch.rand(n, device=part.device) > self.rank_dropout).to(part.dtype)
        if self.rank_dropout_scale:
            kept = kept / kept.mean().clamp(min=1 / n)  # if nothing is kept, there is no scale
        return kept * here

    def merged(self, weight: Tensor, base: nn.Module) -> Tensor:
        return weight + self.update().detach().float()

    def updated(self, weight: Tensor, base: nn.Module) -> Tensor:
        return weight + self.update().to(weight.dtype)


D = TypeVar("D", bound=LycorisDelta)


class LycorisMethod(LinearMethod[D]):
    """Linear method whose ranks and scalings depend on the names of layers."""

    @classmethod
    def check_names(cls, config: PeftConfig, injector: Injector) -> None:
        super().check_names(config, injector)
        assert isinstance(config, LycorisConfig)
        if config.rank_pattern or config.alpha_pattern:
            targets = list(cls.targets(config, injector))
            check_pattern_names("rank_pattern", config.rank_pattern, targets)
            check_pattern_names("alpha_pattern", config.alpha_pattern, targets)

    @classmethod
    def rank(cls, config: PeftConfig, path: str) -> int:
        assert isinstance(config, LycorisConfig)
        return int(pattern_value(path, config.rank_pattern, config.r))

    def size(self, path: str) -> tuple[int, float]:
        """Return (rank, scaling) of the update of the layer at `path`."""
        config = self.config
        assert isinstance(config, LycorisConfig)
        r = self.rank(config, path)
        return r, pattern_value(path, config.alpha_pattern, config.alpha) / r
