"""Soft prompts before the input of torch's nn.TransformerEncoder, which takes embeddings and not input_ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attention.prompt_layout import PromptLayout
from ..core.adapter_selection import PerThread
from ..framework.injector import Injector


@dataclass
class EncoderPrompt:
    """Hooks by which an encoder reads [prompt, src] and returns the positions of src.

    layout: (batch, the prompts' modules) -> PromptLayout.
    leads: callable that returns whether this prompt lays out all prompts of the call.
    The mask between tokens is kept. Virtual positions attend to each other, and all positions attend to them.
    """

    layout: Callable[[Tensor, nn.ModuleDict], PromptLayout]
    leads: Callable[[], bool]
    joined: PerThread[PromptLayout] = field(default_factory=PerThread)

    @staticmethod
    def place(injector: Injector) -> str:
        """Return the path of the encoder.

        Raises NotImplementedError if the model has no nn.TransformerEncoder.
        """
        encoders = [path for path, m in injector.modules().items() if isinstance(m, nn.TransformerEncoder)]
        if not encoders:
            raise NotImplementedError(
                "soft prompt: the model must have get_input_embeddings or an nn.TransformerEncoder, to put it before"
            )
        return encoders[0]

    def attach(self, encoder: nn.Module) -> list[RemovableHandle]:
        before = encoder.register_forward_pre_hook(self.before, with_kwargs=True)
        return [before, encoder.register_forward_hook(self.after)]

    def before(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the encoder: put the prompts before src and extend the masks."""
        if not self.leads():
            return args, kwargs
        names = ("src", "mask", "src_key_padding_mask", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        src = self._batch_first(encoder, given.pop("src"))
        layout = self.layout(src, cast(nn.ModuleDict, encoder.prompt_encoder))
        self.joined.put(layout)
        given["is_causal"] = False  # the extended mask is not the causal mask
        if (mask := given.get("mask")) is not None:
            given["mask"] = _extended(mask, layout.n)
        padding = given.get("src_key_padding_mask")
        seen = layout.mask(None if padding is None else padding == 0, src.shape[1])
        given["src_key_padding_mask"] = None if seen is None else torch.where(seen.bool(), 0.0, float("-inf"))
        return (self._batch_first(encoder, layout.join(layout.front, src)),), given

    def after(self, encoder: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        layout = self.joined.take()
        if layout is None:
            return output
        return self._batch_first(encoder, layout.tokens(self._batch_first(encoder, output)))

    @staticmethod
    def _batch_first(encoder: nn.Module, x: Tensor) -> Tensor:
        """Transpose between the encoder's order of dimensions and [B, S, d]."""
        layers: Any = encoder.layers
        return x if layers[0].self_attn.batch_first else x.transpose(0, 1)


def _extended(mask: Tensor, n: int) -> Tensor:
    """Return a mask [S, S] (bool: True is hidden; float: added) extended by n virtual positions in front."""
    hidden: float | bool = True if mask.dtype == torch.bool else float("-inf")
    size = mask.shape[-1]
    extended = mask.new_zeros(*mask.shape[:-2], n + size, n + size)
    extended[..., :n, n:] = hidden
    extended[..., n:, n:] = mask
    return extended
