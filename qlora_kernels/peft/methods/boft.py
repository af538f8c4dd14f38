"""BOFT: W' = diag(s) W B^T, where B is an orthogonal product of block-diagonal matrices and butterfly permutations.

Source: BOFT (arXiv:2311.06243). Names, defaults and files: PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.config import PeftConfig
from ..core.offloaded import weight_of
from ..framework.linear_method import LinearMethod
from ..framework.method import tensors_by_path
from ..framework.registry import register_method
from ..layers.base_layer import device_of, features
from ..layers.delta import Delta
from .rotation import cayley, drop_blocks, rotate_blocks


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(PeftConfig):
    """Configuration of BOFT, with the fields, names and defaults of PEFT's BOFTConfig.

    boft_block_size, boft_block_num: size and number of the blocks of each factor. Their product is the layer's
    in_features; exactly one is given, the other is 0.
    boft_n_butterfly_factor: number of factors; 1 is OFT with a scale. PEFT always uses 1 on machines without a CUDA
    compiler.
    boft_dropout: fraction of the blocks of one factor that are replaced by the identity in a training step.
    init_weights: True (identity) or False (normal).
    Raises ValueError, naming the field, for a value outside its range and for two sizes that exclude each other.
    """

    peft_type = "BOFT"

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    target_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    exclude_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "boft_only"] = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | tuple[int, ...] | int | None = None
    layers_pattern: list[str] | tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        size, number = self.boft_block_size, self.boft_block_num
        for field, holds, rule in (
            ("boft_block_size", size >= 0, "be >= 0"),
            ("boft_block_num", number >= 0, "be >= 0"),
            ("boft_block_num", (size == 0) != (number == 0), f"be 0 or boft_block_size, which is {size}, must be"),
            ("boft_n_butterfly_factor", self.boft_n_butterfly_factor >= 1, "be >= 1"),
            ("boft_dropout", 0 <= self.boft_dropout < 1, "be in [0, 1)"),
            ("bias", self.bias in ("none", "all", "boft_only"), "be 'none', 'all' or 'boft_only'"),
        ):
            if not holds:
                raise ValueError(f"BOFTConfig: {field} must {rule}, got {getattr(self, field)!r}")

    def blocks(self, path: str, k: int) -> tuple[int, int]:
        """Return (number, size) of the blocks of each factor for the layer at `path`, which has k inputs.

        Raises ValueError if no such blocks exist.
        """
        field = "boft_block_size" if self.boft_block_size else "boft_block_num"
        given, groups = getattr(self, field), 2 ** (self.boft_n_butterfly_factor - 1)
        if k % given:
            raise ValueError(f"BOFTConfig: {field} must divide the {k} inputs of {path}, got {given}")
        number, size = (k // given, given) if self.boft_block_size else (given, k // given)
        if groups > 1 and (number % groups or size % 2):
            raise ValueError(
                f"BOFTConfig: with boft_n_butterfly_factor={self.boft_n_butterfly_factor} the number of blocks must be "
                f"a multiple of {groups} and their size even, got {number} blocks of {size} for {path}"
            )
        return number, size


class BOFTLinear(Delta):
    """Rotation of the input by the skew-symmetric parts of boft_R [factors, D, b, b], and output scale boft_s [N,
    1].
    """

    acts_on_input = True

    def __init__(self, base: nn.Module, path: str, config: BOFTConfig, dtype: torch.dtype) -> None:
        super().__init__()
        k, n = features(base)
        number, size = config.blocks(path, k)
        self.block_dropout = config.boft_dropout
        start_R, start_s = torch.zeros(config.boft_n_butterfly_factor, number, size, size), torch.ones(n, 1)
        if not config.init_weights:
            start_R, start_s = 0.1 * torch.randn_like(start_R), 1 + 0.1 * torch.randn_like(start_s)
        device = device_of(base)
        self.boft_R = nn.Parameter(start_R.to(device, dtype))
        self.boft_s = nn.Parameter(start_s.to(device, dtype))

    def _rotated(self, x: Tensor, *, drop: bool, transposed: bool = False) -> Tensor:
        """Return x [..., K] times B, or times its transpose, in the parameters' dtype.   drop: whether blocks are."""
        raw = weight_of(self, "boft_R")
        factors = list(cayley(0.5 * (raw - raw.transpose(-2, -1))))
        if drop and self.training and self.block_dropout:
            # Indexing by a tensor keeps the choice of the factor inside compiled graphs.
            chosen = torch.arange(len(factors), device=raw.device) == torch.randint(
                len(factors), (1,), device=raw.device
            )
            dropped = [drop_blocks(blocks, self.block_dropout) for blocks in factors]
            factors = [torch.where(chosen[i], dropped[i], blocks) for i, blocks in enumerate(factors)]
        x = x.to(raw.dtype)
        for i in range(len(factors)) if transposed else reversed(range(len(factors))):
            blocks = factors[i].transpose(-2, -1) if transposed else factors[i]
            if len(factors) == 1:
                return rotate_blocks(x, blocks)
            order = butterfly_order(x.shape[-1], blocks.shape[0] // 2**i, blocks.shape[-1] // 2).to(x.device)
            x = rotate_blocks(x.index_select(-1, order.argsort()), blocks).index_select(-1, order)
        return x

    def prepare_input(self, x: Tensor) -> Tensor:
        return self._rotated(x, drop=True).to(x.dtype)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        scale = weight_of(self, "boft_s").flatten()
        if bias is None:
            return (y * scale).to(y.dtype)
        return ((y - bias) * scale + bias).to(y.dtype)

    def merged(self, weight: Tensor, base: nn.Module) -> Tensor:
        return self._updated(weight, drop=False).detach()

    def updated(self, weight: Tensor, base: nn.Module) -> Tensor:
        return self._updated(weight, drop=True)

    def _updated(self, weight: Tensor, *, drop: bool) -> Tensor:
        # (x B) W^T = x (W B^T)^T
        return (weight_of(self, "boft_s") * self._rotated(weight, drop=drop, transposed=True)).to(weight.dtype)


@register_method(BOFTConfig)
class BOFT(LinearMethod[BOFTLinear]):
    """A butterfly rotation and a scale for each linear layer that the configuration targets."""

    config: BOFTConfig

    def new_delta(self, path: str, base: nn.Module) -> BOFTLinear:
        return BOFTLinear(base, path, self.config, self.injector.adapter_dtype)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        # Without a CUDA compiler PEFT trains one factor, although its configuration file may state more.
        stored = tensors_by_path(tensors, self.file_prefix)
        rotations = [stored[key] for path in self.deltas if (key := f"{path}.boft_R") in stored]
        if self.config.boft_n_butterfly_factor > 1 and all(len(rotation) == 1 for rotation in rotations):
            self.config = self.config.replace(boft_n_butterfly_factor=1)
            for delta in self.deltas.values():
                delta.boft_R.data = delta.boft_R.data[:1].clone()
        self.fill(stored)


def butterfly_order(k: int, groups: int, chunk: int) -> Tensor:
    """Return the permutation, int64 [k], that puts the even chunks of each group before the odd ones."""
    chunks = k // groups // chunk
    order = torch.cat([torch.arange(0, chunks, 2), torch.arange(1, chunks, 2)])
    return torch.arange(k).view(groups, chunks, chunk)[:, order].flatten()
