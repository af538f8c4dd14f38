"""Trainable tokens: only some rows of the embedding's table are trained.

Source: PEFT. Names, defaults and files are PEFT's; the mechanism is in token_rows.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ..core.config import PeftConfig
from ..framework.injector import Injector
from ..framework.method import Method
from ..framework.registry import register_method
from .token_rows import add_token_rows, input_embeddings_path, layers_with_tables


@dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(PeftConfig):
    """Configuration of trainable tokens, with the fields, names and defaults of PEFT's TrainableTokensConfig.

    token_indices: ids of the tokens whose rows train.
    target_modules: embeddings or heads; None is the model's input embedding. Layers tied to an embedding share its
    rows.
    init_weights: True (the rows of the base: identity) or False (normal).
    Raises ValueError, naming the field, for modules_to_save, which files of this type cannot hold.
    """

    peft_type = "TRAINABLE_TOKENS"

    token_indices: list[int] | tuple[int, ...] = field(default_factory=list)
    target_modules: list[str] | tuple[str, ...] | set[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules_to_save:
            raise ValueError(
                "TrainableTokensConfig: modules_to_save must be None, since files of this type have no place for them, "
                f"got {list(self.modules_to_save)}; use LoraConfig with trainable_token_indices"
            )

    @property
    def heads(self) -> tuple[str, ...]:
        """None, because a file of this type cannot hold a head."""
        return ()


@register_method(TrainableTokensConfig)
class TrainableTokens(Method):
    """Trained rows of the targeted tables."""

    config: TrainableTokensConfig
    loads_in_peft = True

    def __init__(self, config: PeftConfig, injector: Injector, name: str) -> None:
        assert isinstance(config, TrainableTokensConfig)
        targets = config.target_modules
        if targets is None:
            targets = input_embeddings_path(injector, "target_modules")
        super().__init__(config.replace(target_modules=targets), injector, name)
        self.layers = list(layers_with_tables(injector, "target_modules", targets))
        self.shared: dict[str, str] = {}

    def attach(self) -> None:
        super().attach()
        tokens = dict.fromkeys(self.layers, self.config.token_indices)
        self.shared = add_token_rows(self, "token_indices", tokens, init=self.config.init_weights)

    def merge_unsupported(self) -> str | None:
        return None

    def file_config(self) -> dict[str, object]:
        values = super().file_config()
        del values["modules_to_save"]
        return values

    def tensors(self) -> dict[str, Tensor]:
        """Return the rows under the names of all layers that have them, as PEFT writes them."""
        return {**super().tensors(), **{name: tensor.clone() for name, tensor in self._copies(super().tensors())}}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        copies = {name for name, _ in self._copies(tensors)}
        super().load_tensors({name: tensor for name, tensor in tensors.items() if name not in copies})

    def _copies(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Return (name in the file, rows) of the layers that share the rows of another layer."""
        for path, first in self.shared.items():
            name, of_first = (f"{self.file_prefix}{each}.trainable_tokens_delta" for each in (path, first))
            if of_first in tensors:
                yield name, tensors[of_first]
