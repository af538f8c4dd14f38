"""OFT: W' = W R^T with an orthogonal, block-diagonal R: the inputs of the layer are rotated in groups.

Source: OFT (arXiv:2306.07280), OFTv2 (arXiv:2506.19847). Names, defaults and files: PEFT's.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.config import PeftConfig
from ..core.offloaded import weight_of
from ..framework.linear_method import LinearMethod
from ..framework.registry import register_method
from ..layers.base_layer import device_of, features
from ..layers.delta import Delta
from .rotation import cayley, cayley_neumann, drop_blocks, rotate_blocks


@dataclass(frozen=True, kw_only=True)
class OFTConfig(PeftConfig):
    """Configuration of OFT, with the fields, names and defaults of PEFT's OFTConfig.

    r, oft_block_size: number and size of the blocks of R. Their product is the layer's in_features; exactly one is
    given, the other is 0. A value that does not divide in_features is changed to the nearest divisor, with a warning.
    use_cayley_neumann: whether R is a sum of num_cayley_neumann_terms terms, which is nearly orthogonal, instead of the
    exact Cayley transform.
    coft, eps: whether the blocks stay within eps of the identity.   block_share: one block for all of a layer.
    module_dropout: fraction of the blocks that are replaced by the identity in a training step.
    init_weights: True (identity) or False (normal).
    Raises ValueError, naming the field, for a value outside its range and for two sizes that exclude each other.
    """

    peft_type = "OFT"

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    target_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    exclude_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | tuple[int, ...] | int | None = None
    layers_pattern: list[str] | tuple[str, ...] | str | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, holds, rule in (
            ("r", self.r >= 0, "be >= 0"),
            ("oft_block_size", self.oft_block_size >= 0, "be >= 0"),
            ("oft_block_size", (self.r == 0) != (self.oft_block_size == 0), f"be 0 or r, which is {self.r}, must be"),
            ("module_dropout", 0 <= self.module_dropout < 1, "be in [0, 1)"),
            ("eps", self.eps > 0, "be > 0"),
            ("num_cayley_neumann_terms", self.num_cayley_neumann_terms >= 1, "be >= 1"),
            ("bias", self.bias in ("none", "all", "oft_only"), "be 'none', 'all' or 'oft_only'"),
        ):
            if not holds:
                raise ValueError(f"OFTConfig: {field} must {rule}, got {getattr(self, field)!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OFTConfig:
        """Return the configuration of a file. Raises NotImplementedError for files of PEFT before 0.15, whose OFT is
        another method.
        """
        if "oft_block_size" not in values:
            raise NotImplementedError(
                "adapter_config.json: an OFT adapter must have oft_block_size; without it the file is of PEFT 0.13 or "
                "earlier, which stored other parameters"
            )
        return super().from_dict(values)


class OFTRotation(nn.Module):
    """Rotation from weight [D, b (b - 1) / 2], the upper triangles of skew-symmetric matrices; D = 1 if all blocks are
    the same.
    """

    rows: Tensor
    cols: Tensor

    def __init__(self, blocks: int, size: int, config: OFTConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.coft, self.eps = size, config.coft, config.eps
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.dropout_p = config.module_dropout
        start = torch.zeros(blocks, size * (size - 1) // 2)
        if not config.init_weights:
            nn.init.normal_(start, std=0.1)
        self.weight = nn.Parameter(start.to(device, dtype))

    def blocks(self, *, drop: bool = True) -> Tensor:
        """Return R's blocks [D, b, b].   drop: whether module_dropout acts in training."""
        weight = self._constrained(weight_of(self, "weight")) if self.coft else weight_of(self, "weight")
        rows, cols = torch.triu_indices(self.size, self.size, 1, device=weight.device)
        upper = weight.new_zeros(weight.shape[0], self.size, self.size)
        upper = upper.index_put((torch.arange(len(weight), device=weight.device)[:, None], rows, cols), weight)
        skew = upper - upper.transpose(-2, -1)
        blocks = cayley(skew) if self.terms is None else cayley_neumann(skew, self.terms)
        drops = drop and self.training and len(blocks) > 1 and self.dropout_p > 0
        return drop_blocks(blocks, self.dropout_p) if drops else blocks

    def _constrained(self, weight: Tensor) -> Tensor:
        """Return the weight with its blocks projected to within eps. In training the parameter is set to the
        projection.
        """
        with torch.no_grad():
            # Each entry of the triangle occurs twice in its block.
            norm = math.sqrt(2) * weight.norm(dim=1, keepdim=True)
            limit = self.eps / math.sqrt(len(weight))
            pulled = torch.where(norm <= limit, weight, weight * (limit / norm))
            if self.training:
                weight.copy_(pulled)
                return weight
        return weight + (pulled - weight.detach())


class OFTLinear(Delta):
    """Rotation of the layer's input by oft_R."""

    acts_on_input = True
    first_is_outermost = True  # as in PEFT, which applies rotations to x in the order of the adapters

    def __init__(self, base: nn.Module, path: str, config: OFTConfig, dtype: torch.dtype) -> None:
        super().__init__()
        k, _ = features(base)
        size = _divisor(path, "oft_block_size", config.oft_block_size, k) if config.oft_block_size else 0
        blocks = k // size if size else _divisor(path, "r", config.r, k)
        blocks, size = (1 if config.block_share else blocks), k // blocks
        self.oft_R = OFTRotation(blocks, size, config, device_of(base), dtype)

    def prepare_input(self, x: Tensor) -> Tensor:
        blocks = self.oft_R.blocks()
        return rotate_blocks(x.to(blocks.dtype), blocks).to(x.dtype)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        return y

    def merged(self, weight: Tensor, base: nn.Module) -> Tensor:
        return self._updated(weight, self.oft_R.blocks(drop=False)).detach()

    def updated(self, weight: Tensor, base: nn.Module) -> Tensor:
        return self._updated(weight, self.oft_R.blocks())

    def _updated(self, weight: Tensor, blocks: Tensor) -> Tensor:
        # (x R) W^T = x (W R^T)^T
        return rotate_blocks(weight.to(blocks.dtype), blocks.transpose(-2, -1)).to(weight.dtype)


@register_method(OFTConfig)
class OFT(LinearMethod[OFTLinear]):
    """A rotation of the input of each targeted linear layer."""

    config: OFTConfig

    def new_delta(self, path: str, base: nn.Module) -> OFTLinear:
        return OFTLinear(base, path, self.config, self.injector.adapter_dtype)


def _divisor(path: str, field: str, wanted: int, k: int) -> int:
    """Return the divisor of k nearest to `wanted`, and of two equally near the smaller one, by PEFT's rule."""
    if k % wanted == 0:
        return wanted
    divisors = [d for d in range(1, k + 1) if k % d == 0]
    nearest = min(divisors, key=lambda d: (abs(d - wanted), d))
    warnings.warn(f"{field}: {wanted} does not divide the {k} inputs of {path}; {nearest} is taken", stacklevel=6)
    return nearest
