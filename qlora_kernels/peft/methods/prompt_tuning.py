"""Prompt Tuning: n trained embeddings before the input, in the input layer only.

Source: Lester et al. (arXiv:2104.08691).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..core.offloaded import weight_of
from ..framework.registry import register_method
from .soft_prompt import SoftPrompt, SoftPromptConfig, input_embeddings

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(SoftPromptConfig):
    """Configuration of prompt tuning.

    prompt_tuning_init: "RANDOM" (uniform in [-0.5, 0.5], as in the paper; PEFT draws from N(0, 1)), "SAMPLE_VOCAB"
    (embeddings of tokens drawn from the first sample_vocab_size ids, which are the most frequent in most vocabularies),
    or "TEXT" (embeddings of init_token_ids, repeated or cut to n; an entry that is a list, such as a class label of
    several tokens, gives the mean of its embeddings). from_text(text, tokenizer) fills in init_token_ids.
    Raises ValueError, naming the field, for another prompt_tuning_init.
    """

    peft_type = "PROMPT_TUNING"

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    init_token_ids: list[int | list[int]] | tuple[int, ...] | None = None
    sample_vocab_size: int = 5000

    own_fields: ClassVar[tuple[str, ...]] = (*SoftPromptConfig.own_fields, "init_token_ids", "sample_vocab_size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in ("RANDOM", "SAMPLE_VOCAB", "TEXT"):
            known = "'RANDOM', 'SAMPLE_VOCAB' or 'TEXT'"
            raise ValueError(f"PromptTuningConfig: prompt_tuning_init must be {known}, got {self.prompt_tuning_init!r}")

    @classmethod
    def from_text(cls, text: str, tokenizer: Callable[[str], Any], **fields: Any) -> Self:
        """Return a configuration that starts from the embeddings of `text`; num_virtual_tokens defaults to its length
        in tokens.

        tokenizer: callable as in transformers; tokenizer(text)["input_ids"] is a list of ids.
        """
        ids = list(tokenizer(text)["input_ids"])
        fields = {"num_virtual_tokens": len(ids), **fields}
        return cls(prompt_tuning_init="TEXT", prompt_tuning_init_text=text, init_token_ids=ids, **fields)


class PromptTable(nn.Module):
    """Trained prompt `embedding.weight` [n, d]."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows)

    def forward(self) -> Tensor:
        return weight_of(self.embedding, "weight")


@register_method(PromptTuningConfig)
class PromptTuning(SoftPrompt):
    """Soft prompt whose embeddings are the trained parameters."""

    config: PromptTuningConfig

    @torch.no_grad()
    def new_prompt(self) -> PromptTable:
        return PromptTable(self._start().to(self.embedding_device(), self.injector.adapter_dtype, copy=True))

    def set_prompt(self, rows: Tensor) -> None:
        with torch.no_grad():
            self.prompt().copy_(rows)

    def _start(self) -> Tensor:
        config, n = self.config, self.config.num_virtual_tokens
        if config.prompt_tuning_init == "RANDOM":
            return torch.rand(n, cast(int, config.token_dim), device=self.embedding_device()) - 0.5
        embeddings = input_embeddings(self.injector)
        if embeddings is None:
            raise ValueError("prompt_tuning_init: must be 'RANDOM' for a model without get_input_embeddings")
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            drawn = torch.randint(0, min(config.sample_vocab_size, embeddings.num_embeddings), (n,))
            return self._means(embeddings, drawn.tolist())
        if not config.init_token_ids:
            raise ValueError(
                "PromptTuningConfig: init_token_ids must be given for 'TEXT'; PromptTuningConfig.from_text fills it in"
            )
        entries = list(config.init_token_ids)
        return self._means(embeddings, (entries * (n // len(entries) + 1))[:n])

    @staticmethod
    def _means(embeddings: nn.Embedding, entries: list[Any]) -> Tensor:
        device = embeddings.weight.device
        groups = [torch.tensor(e if isinstance(e, (list, tuple)) else [e], device=device) for e in entries]
        return torch.stack([embeddings(group).float().mean(0) for group in groups])
