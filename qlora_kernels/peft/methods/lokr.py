"""LoKr: W' = W + (alpha / r) kron(W1, W2), where W1 and W2 may be products of rank r.

Source: LyCORIS (arXiv:2309.14859). Names, defaults and files: PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.offloaded import weight_of
from ..framework.registry import register_method
from ..layers.base_layer import device_of, features
from .lycoris import LycorisConfig, LycorisDelta, LycorisMethod


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisConfig):
    """Configuration of LoKr, with the fields, names and defaults of PEFT's LoKrConfig.

    decompose_factor: size of W1 in each dimension that it divides; -1 = near the square root.
    decompose_both: whether W1 too is a product of rank r if r is less than half of its larger side. W2 always follows
    this rule.
    rank_dropout: probability with which an output feature of the update is zeroed in a training step;
    rank_dropout_scale: whether the others are scaled up. module_dropout: probability with which a layer's whole update
    is left out of a training step.
    init_weights: True (W1 zero: identity), "lycoris" (W2 zero: identity) or False (all Kaiming uniform).
    use_effective_conv2d: accepted for PEFT's files; it has no effect on linear layers.
    Raises ValueError, naming the field, for a decompose_factor or init_weights outside the values above.
    """

    peft_type = "LOKR"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor == 0 or self.decompose_factor < -1:
            raise ValueError(f"LoKrConfig: decompose_factor must be -1 or >= 1, got {self.decompose_factor}")
        if not isinstance(self.init_weights, bool) and self.init_weights != "lycoris":
            raise ValueError(f"LoKrConfig: init_weights must be a bool or 'lycoris', got {self.init_weights!r}")


class LoKrLinear(LycorisDelta):
    """Update kron(W1, W2): lokr_w1 [L, M] and lokr_w2 [N / L, K / M], each as a matrix or as a pair `_a` [L, r], `_b`
    [r, M].
    """

    def __init__(self, base: nn.Module, r: int, scaling: float, config: LoKrConfig, dtype: torch.dtype) -> None:
        super().__init__(scaling, config)
        k, n = features(base)
        self.rank_dropout_scale = config.rank_dropout_scale
        outer, inner = zip(
            factorization(n, config.decompose_factor), factorization(k, config.decompose_factor), strict=True
        )
        device = device_of(base)
        self._add("lokr_w1", outer, r, config.decompose_both and r < max(outer) / 2, device, dtype)
        self._add("lokr_w2", inner, r, r < max(inner) / 2, device, dtype)
        if config.init_weights:
            zero = ("lokr_w2", "lokr_w2_b") if config.init_weights == "lycoris" else ("lokr_w1", "lokr_w1_a")
            for name in zero:
                if name in self._parameters:
                    nn.init.zeros_(self.get_parameter(name))

    def _add(
        self, name: str, shape: tuple[int, int], r: int, pair: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        shapes = {f"{name}_a": (shape[0], r), f"{name}_b": (r, shape[1])} if pair else {name: shape}
        for each, size in shapes.items():
            parameter = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            self.register_parameter(each, parameter)

    def _matrix(self, name: str) -> Tensor:
        if hasattr(self, name):
            return weight_of(self, name)
        return weight_of(self, f"{name}_a") @ weight_of(self, f"{name}_b")

    @property
    def dtype(self) -> torch.dtype:
        return weight_of(self, "lokr_w1" if hasattr(self, "lokr_w1") else "lokr_w1_a").dtype

    def update(self) -> Tensor:
        return self.scaling * torch.kron(self._matrix("lokr_w1"), self._matrix("lokr_w2").contiguous())

    def product(self, x: Tensor) -> Tensor:
        # With x as a matrix X [M, K / M], kron(W1, W2) x is W1 X W2^T, so the dense update is not computed.
        w1, w2 = self._matrix("lokr_w1"), self._matrix("lokr_w2")
        matrix = x.reshape(*x.shape[:-1], w1.shape[1], w2.shape[1])
        y: Tensor = self.scaling * (w1 @ (matrix @ w2.T))
        return y.flatten(-2)


@register_method(LoKrConfig)
class LoKr(LycorisMethod[LoKrLinear]):
    """LoKr updates of the targeted linear layers."""

    config: LoKrConfig

    def new_delta(self, path: str, base: nn.Module) -> LoKrLinear:
        r, scaling = self.size(path)
        return LoKrLinear(base, r, scaling, self.config, self.injector.adapter_dtype)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Return (m, n) with m * n = dimension and m <= n, as LyCORIS and PEFT choose them.

    factor: value of m if it divides `dimension`, else an upper bound of m; -1 = as near to the square root as possible.
    m is larger than n only for a factor that divides `dimension`.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = dimension if factor == -1 else factor
    pairs = ((m, dimension // m) for m in range(1, math.isqrt(dimension) + 1) if dimension % m == 0 and m <= most)
    return max(pairs)
