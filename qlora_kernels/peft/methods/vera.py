"""VeRA: W' = W + diag(b) B diag(d) A with trained vectors b and d, and random matrices A and B shared by all layers.

Source: VeRA (arXiv:2310.11454). Names, defaults and files: PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...nn.module_tree import has_hooks
from ..core.config import PeftConfig
from ..core.offloaded import weight_of
from ..framework.linear_method import LinearMethod
from ..framework.method import PROMPT_PREFIX, load_into, tensors_by_path
from ..framework.registry import register_method
from ..layers.base_layer import device_of, features
from ..layers.delta import Delta
from ..layers.lowrank import LoraFactors, add_lowrank

PROJECTIONS = ("vera_A", "vera_B")
"""Names of the shared projections. In files they have the same prefix as prompts."""


@dataclass(frozen=True, kw_only=True)
class VeraConfig(PeftConfig):
    """Configuration of VeRA, with the fields, names and defaults of PEFT's VeraConfig.

    projection_prng_key: seed of the shared projections.
    save_projection: whether files hold the projections; otherwise a loaded adapter computes them from the seed.
    d_initial: start value of the trained vector of length r; the other vector starts at zero, so that the start is the
    identity.
    init_weights: False starts from ones and normal numbers instead.
    Raises ValueError, naming the field, for a rank below 1, a dropout outside [0, 1) or an unknown bias.
    """

    peft_type = "VERA"
    exclude_modules: ClassVar[None] = None

    r: int = 256
    target_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vera_only"] = "none"
    init_weights: bool = True
    layers_to_transform: list[int] | tuple[int, ...] | int | None = None
    layers_pattern: list[str] | tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ValueError(f"VeraConfig: r must be >= 1, got {self.r}")
        if not 0.0 <= self.vera_dropout < 1.0:
            raise ValueError(f"VeraConfig: vera_dropout must be in [0, 1), got {self.vera_dropout}")
        if self.bias not in ("none", "all", "vera_only"):
            raise ValueError(f"VeraConfig: bias must be 'none', 'all' or 'vera_only', got {self.bias!r}")


class VeraProjection(nn.Module):
    """Shared, untrained matrices vera_A [r, K] and vera_B [N, r], with the largest K and N of the layers."""

    buffers_never_change = True
    """Read by distributed/ddp.py, which does not have them broadcast in every forward."""
    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, r: int, k: int, n: int, key: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        # Drawn on the CPU for every device, so that the numbers equal PEFT's for the same key.
        generator = torch.Generator(device="cpu").manual_seed(key)
        for name, shape in (("vera_A", (r, k)), ("vera_B", (n, r))):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
            values = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, values.to(device, dtype))


class VeraLinear(Delta):
    """Update with the trained vectors vera_lambda_d [r] and vera_lambda_b [N]; `projection` is shared by all layers."""

    def __init__(self, base: nn.Module, projection: VeraProjection, config: VeraConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.k, n = features(base)
        device = device_of(base)
        self.dropout_p = config.vera_dropout
        start_d, start_b = torch.full((config.r,), config.d_initial), torch.zeros(n)
        if not config.init_weights:
            start_d, start_b = torch.randn(config.r), torch.ones(n)
        self.vera_lambda_d = nn.Parameter(start_d.to(device, dtype))
        self.vera_lambda_b = nn.Parameter(start_b.to(device, dtype))
        self.projection = projection

    def lowrank(self) -> LoraFactors:
        # The vectors are multiplied into the factors, so the fused LoRA op applies and autograd splits its gradients.
        lambda_d, lambda_b = weight_of(self, "vera_lambda_d"), weight_of(self, "vera_lambda_b")
        projection = self.projection
        vera_A = projection.vera_A[:, : self.k].to(lambda_d.device)
        vera_B = projection.vera_B[: len(lambda_b)].to(lambda_b.device)
        return lambda_d[:, None] * vera_A, lambda_b[:, None] * vera_B, 1.0

    def factors(self) -> LoraFactors | None:
        return None if has_hooks(self) else self.lowrank()

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        return add_lowrank(x, y, [self.lowrank()], dropout_p=self.dropout_p if self.training else 0.0)


@register_method(VeraConfig)
class Vera(LinearMethod[VeraLinear]):
    """Two trained vectors for each targeted linear layer."""

    config: VeraConfig
    rank_tensors: ClassVar[dict[str, int]] = {"vera_lambda_d": 0}

    @classmethod
    def rank(cls, config: PeftConfig, path: str) -> int:
        assert isinstance(config, VeraConfig)
        return config.r

    def new_delta(self, path: str, base: nn.Module) -> VeraLinear:
        projection = self._new_projection() if not self.deltas else self.projection
        return VeraLinear(base, projection, self.config, self.injector.adapter_dtype)

    @property
    def projection(self) -> VeraProjection:
        """Return the random matrices that all layers share."""
        return next(iter(self.deltas.values())).projection

    def _new_projection(self) -> VeraProjection:
        layers = list(self.targets(self.config, self.injector).values())
        k, n = (max(sizes) for sizes in zip(*map(features, layers), strict=True))
        config, device = self.config, device_of(layers[0])
        return VeraProjection(config.r, k, n, config.projection_prng_key, device, self.injector.adapter_dtype)

    # Files hold the projections once or not at all.

    def state_dict(self) -> dict[str, Tensor]:
        tensors = {name: tensor for name, tensor in super().state_dict().items() if ".projection." not in name}
        return tensors | (dict(self.projection.named_buffers()) if self.config.save_projection else {})

    def tensors(self) -> dict[str, Tensor]:
        tensors = super().tensors()
        for name in PROJECTIONS if self.config.save_projection else ():
            tensors[f"{PROMPT_PREFIX}{name}"] = tensors.pop(f"{self.file_prefix}{name}")
        return tensors

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        stored = tensors_by_path(tensors, self.file_prefix)
        if not self.config.save_projection:
            # The file may hold projections anyway; they are used, because the vectors were trained with them.
            held = {name: stored.pop(name) for name in PROJECTIONS if name in stored}
            if held:
                load_into(self.projection, held)
        self.fill(stored)
