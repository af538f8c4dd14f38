"""LoRA of an embedding, computed as for a linear layer whose input is one-hot tokens."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.offloaded import weight_of
from ..layers.base_layer import dense_weight, device_of, embedding_scale, features
from ..layers.delta import Delta
from .lora_config import LoraConfig
from .lora_layers import Dora


class LoraEmbedding(Delta):
    """LoRA of a table: scaling * B A[:, t] is added to row t; lora_embedding_A [r, vocab], lora_embedding_B [d, r].

    A starts at zero and B normal, so that the start is the identity, also for "gaussian". There is no dropout, as in
    PEFT.
    Raises NotImplementedError for lora_bias and for other values of init_lora_weights than a bool or "gaussian".
    """

    def __init__(self, base: nn.Module, r: int, scaling: float, config: LoraConfig, dtype: torch.dtype) -> None:
        super().__init__()
        if config.lora_bias or config.init_lora_weights not in (True, False, "gaussian"):
            raise NotImplementedError(
                "LoraConfig: an embedding must have lora_bias=False and init_lora_weights a bool or 'gaussian', got "
                f"{config.lora_bias} and {config.init_lora_weights!r}; leave embeddings out of target_modules"
            )
        vocab, d = features(base)
        device, self.scaling = device_of(base), scaling
        A = torch.zeros if config.init_lora_weights else torch.randn
        self.lora_embedding_A = nn.Parameter(A(r, vocab, device=device, dtype=dtype))
        self.lora_embedding_B = nn.Parameter(torch.randn(d, r, device=device, dtype=dtype))

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Copy lora_A [r, vocab] and lora_B [d, r] into the parameters."""
        self.lora_embedding_A.data.copy_(lora_A)
        self.lora_embedding_B.data.copy_(lora_B)

    def lowrank(self) -> tuple[Tensor, Tensor, float]:
        return weight_of(self, "lora_embedding_A"), weight_of(self, "lora_embedding_B"), self.scaling

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        return (y + self._update(x, base)).to(y.dtype)

    def _update(self, x: Tensor, base: nn.Module) -> Tensor:
        padding_idx = cast("nn.Embedding", base).padding_idx
        s = F.embedding(x, self.lora_embedding_A.T, padding_idx)
        return self.scaling * F.linear(s, self.lora_embedding_B) * embedding_scale(base)


class DoraEmbedding(Dora, LoraEmbedding):
    """DoRA of a table: each of its columns, over all tokens, has a direction and a lora_magnitude_vector [d]."""

    def __init__(self, base: nn.Module, r: int, scaling: float, config: LoraConfig, dtype: torch.dtype) -> None:
        super().__init__(base, r, scaling, config, dtype)
        self.lora_magnitude_vector = nn.Parameter(dense_weight(base).norm(dim=1).to(dtype))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        return (self.row_scale(base) * (y + self._update(x, base))).to(y.dtype)
