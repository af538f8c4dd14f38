"""resize_token_embeddings for a model whose adapters replace the embeddings or the head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...nn.module_tree import input_embeddings_of, output_embeddings_of
from ..framework.injector import Injector
from ..framework.method import all_methods
from ..layers.adapted_linear import AdaptedLinear, base_of


def resize_token_embeddings(injector: Injector, *args: Any, **kwargs: Any) -> Any:
    """Resize the base model's own embeddings, then the adapters' copies of them. See PeftModel.

    Raises ValueError if a LoRA or trained rows adapt the embeddings, because these belong to the old table.
    """
    model: Any = injector.model
    for path, module in injector.modules().items():
        if module in _tables(injector) and isinstance(injector.hooked_module(path), AdaptedLinear):
            raise ValueError(
                f"resize_token_embeddings: {path} must have no LoRA or trained rows, which are of the old table; call "
                "merge_and_unload first, or resize before the adapter is added"
            )
    # Looked up by path, because the model's method replaces some modules.
    copies = [(m.overrides, path, m.overrides.copy(path)) for m in all_methods(injector) for path in m.overrides.paths]
    with injector.selection.disabled():
        result = model.resize_token_embeddings(*args, **kwargs)
    resized: dict[int, nn.Parameter] = {}
    for overrides, path, copy in copies:
        own = overrides.original(path)
        if copy is not None and own is not None and (own.shape != copy.shape or overrides.copy(path) is None):
            if id(copy) not in resized:
                resized[id(copy)] = nn.Parameter(_resized(copy, own), requires_grad=copy.requires_grad)
            overrides.set_copy(path, resized[id(copy)])
    return result


def _tables(injector: Injector) -> list[nn.Module]:
    """The input embeddings and the head, as layers without adapters."""
    tables = [input_embeddings_of(injector.model), output_embeddings_of(injector.model)]
    return [base_of(table) for table in tables if table is not None]


def _resized(copy: Tensor, own: Tensor) -> Tensor:
    """Return `copy` with the number of rows of `own`; added rows are those of `own`."""
    rows = min(len(copy), len(own))
    resized = own.detach().to(copy.dtype, copy=True)
    resized[:rows] = copy.detach()[:rows]
    return resized
