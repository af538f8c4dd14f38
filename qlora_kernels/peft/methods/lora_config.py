"""LoraConfig: the configuration of LoRA, rsLoRA and DoRA, with PEFT's fields."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ..core.config import PeftConfig


@dataclass(frozen=True, kw_only=True)
class LoraConfig(PeftConfig):
    """Configuration of LoRA, with the fields, names and defaults of PEFT's LoraConfig.

    init_lora_weights: True (A Kaiming uniform, B zero: identity), "gaussian" (A normal of std 1/r, B zero: identity),
    "orthogonal" (random, the rows of A orthogonal to the columns of B in the r dimensions: identity; r must be even),
    "pissa" or "pissa_niter_<n>" (the principal part of W), "olora" (the first part of W's QR decomposition), "loftq"
    (quantizes a dense base and fits the error), "eva" (A from the layer's inputs: initialize_eva fills it in), False
    (both Kaiming: not identity).   loftq_config: {"loftq_iter": n}.
    lora_bias: whether B has a bias, which is scaled and merged with B.
    ensure_weight_tying: whether layers that share a weight, such as the head and the embedding, share one update. It
    applies to modules_to_save and to target_modules; the head uses the embedding's LoRA transposed.
    target_parameters: names, or endings of names, of parameters that are not weights of a linear layer, such as the
    [experts, out, in] weights of a mixture of experts, dense or ExpertsNF4. If it is given, target_modules None or []
    selects no layers.
    trainable_token_indices: tokens whose rows of the input embedding train too, or a dictionary from names of
    embeddings and heads to such tokens. Layers that share a weight share the rows, unless they are given tokens of
    their own.
    target_modules may also name an nn.Embedding, whose LoRA is that of a linear layer with one-hot inputs, and an
    nn.Conv1d, Conv2d or Conv3d, whose lora_A is a convolution to r channels and lora_B one of kernel size 1. For these
    layers init_lora_weights is a bool or "gaussian".
    Raises ValueError, naming the field, for a value outside its range and for options that exclude each other.
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
    trainable_token_indices: list[int] | tuple[int, ...] | dict[str, list[int]] | None = None

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
        """Return the factor of B A: alpha / r, or alpha / sqrt(r) with use_rslora."""
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def starts_in_base(how: bool | str) -> bool:
    """Return whether the start values are subtracted from the base's weight, as for PiSSA and OLoRA."""
    return str(how).startswith("pissa") or how == "olora"
