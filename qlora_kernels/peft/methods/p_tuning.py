"""P-Tuning (v1): virtual tokens whose embeddings come from a small trained network.

Source: Liu et al. (arXiv:2103.10385).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ...nn.quantized_weight import is_sharded
from ..core.adapter_tree import effective_state
from ..core.offloaded import weight_of
from ..core.sharded import full_tensors
from ..framework.method import load_into
from ..framework.registry import register_method
from .prompt_tuning import PromptTable
from .soft_prompt import SoftPrompt, SoftPromptConfig


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(SoftPromptConfig):
    """Configuration of P-Tuning, with the fields of PEFT's PromptEncoderConfig.

    encoder_reparameterization_type: "MLP" = three linear layers with ReLU between; "LSTM" = a bidirectional LSTM of
    encoder_num_layers, then two linear layers with ReLU between. encoder_hidden_size: None = d. The paper's LAMA
    encoder is LSTM with encoder_hidden_size = d / 2.   encoder_dropout: between LSTM layers.
    With placeholder_token_id the virtual tokens are inserted at the positions of a template, among anchor words.
    Raises ValueError, naming the field, for another encoder_reparameterization_type, and for a number of layers that it
    does not support.
    """

    peft_type = "P_TUNING"

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.encoder_reparameterization_type
        if kind not in ("MLP", "LSTM"):
            raise ValueError(f"PTuningConfig: encoder_reparameterization_type must be 'MLP' or 'LSTM', got {kind!r}")
        if kind == "MLP" and self.encoder_num_layers != 2:
            raise ValueError("PTuningConfig: encoder_num_layers must be 2 with 'MLP', which has three layers always")


class PromptEncoder(nn.Module):
    """Network that maps a trained embedding [n, d] to the prompt [n, d]."""

    def __init__(self, config: PTuningConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        d, hidden = cast(int, config.token_dim), cast(int, config.encoder_hidden_size)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(config.num_virtual_tokens, d, **made)
        self.lstm = None
        if config.encoder_reparameterization_type == "LSTM":
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm = nn.LSTM(d, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True, **made)
            sizes = [2 * hidden, 2 * hidden, d]
        else:
            sizes = [d, hidden, hidden, d]
        linears = [nn.Linear(*pair, **made) for pair in pairwise(sizes)]
        self.mlp = nn.Sequential(linears[0], *(m for linear in linears[1:] for m in (nn.ReLU(), linear)))

    def forward(self) -> Tensor:
        x = weight_of(self.embedding, "weight")
        if self.lstm is not None:
            # Without autocast: oneDNN's LSTM takes no fp16 on a CPU, and bf16 only with AVX-512.
            with torch.autocast(x.device.type, enabled=False):
                x = self.lstm(x[None])[0][0]
        y: Tensor = self.mlp(x)
        return y


@register_method(PTuningConfig)
class PTuning(SoftPrompt):
    """Soft prompt from a PromptEncoder in training, and from a PromptTable of its last output once loaded for
    inference.
    """

    config: PTuningConfig

    def new_prompt(self) -> PromptEncoder:
        self.config = self.config.replace(encoder_hidden_size=self.config.encoder_hidden_size or self.config.token_dim)
        return PromptEncoder(self.config, self.embedding_device(), self.injector.adapter_dtype)

    def prompt(self) -> Tensor:
        if not _is_sharded(self.module):
            return super().prompt()
        with torch.random.fork_rng(devices=[]):
            encoder = self.new_prompt()  # outside of a forward, an LSTM takes no shards
        load_into(encoder, full_tensors(self.module.state_dict()))
        whole: Tensor = encoder.train(self.module.training)()
        return whole

    def set_prompt(self, rows: Tensor) -> None:
        """Replace the encoder by these embeddings, which are then the trained parameters."""
        self.replace_module(PromptTable(rows.to(self.embedding_device(), self.injector.adapter_dtype, copy=True)))

    def extras(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().extras()
        return values, {**tensors, **(effective_state(self.module) if isinstance(self.module, PromptEncoder) else {})}

    def load_extras(self, values: dict[str, Any], tensors: dict[str, Tensor], *, is_trainable: bool) -> None:
        # A sharded encoder stays as it is: its values are among the trained parameters of a run's checkpoint.
        if tensors and is_trainable and not _is_sharded(self.module):
            encoder = self.new_prompt()
            load_into(encoder, tensors)
            self.replace_module(encoder)


def _is_sharded(module: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in module.parameters())
