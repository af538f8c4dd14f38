"""Embeddings of another size: resize_token_embeddings of a model with adapters, and what files do not have."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapted_linear import AdaptedLinear, base_of
from .base_layer import features
from .host import Host


def resize_token_embeddings(host: Host, *args: Any, **kwargs: Any) -> Any:
    """The base model's method, over its own parameters; then the copies follow. See PeftModel."""
    model: Any = host.model
    for path, module in host.modules().items():
        if module in _tables(host) and isinstance(host.place(path), AdaptedLinear):
            raise ValueError(
                f"resize_token_embeddings: {path} must have no LoRA, whose factors are of the old size; call "
                "merge_and_unload first, or resize before the adapter is added"
            )
    overrides = [method.overrides for methods in host.adapters.values() for m in methods for method in (m, *m.parts)]
    # By path: the model's method puts a new module in the place of some.
    copies = [(each, path, each.copy(path)) for each in overrides for path in each.paths]
    with host.selection.disabled():
        result = model.resize_token_embeddings(*args, **kwargs)
    resized: dict[int, nn.Parameter] = {}
    for each, path, copy in copies:
        own = each.original(path)
        if copy is not None and own is not None and (own.shape != copy.shape or each.copy(path) is None):
            if id(copy) not in resized:
                resized[id(copy)] = nn.Parameter(_resized(copy, own), requires_grad=copy.requires_grad)
            each.set_copy(path, resized[id(copy)])
    return result


def _tables(host: Host) -> list[nn.Module]:
    """The input embeddings and the head, as layers without adapters."""
    model: Any = host.model
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [base_of(table) for table in tables if table is not None]


def _resized(copy: Tensor, own: Tensor) -> Tensor:
    """`copy` with as many rows as `own`, further rows being own's."""
    rows = min(len(copy), len(own))
    resized = own.detach().to(copy.dtype, copy=True)
    resized[:rows] = copy.detach()[:rows]
    return resized


def warn_of_resized_embeddings(host: Host, name: str) -> None:
    """Warns where the embeddings were resized and adapter `name` has no copy of them: then no file has the new rows."""
    get = getattr(host.model, "get_input_embeddings", None)
    table = get() if callable(get) else None
    if table is None or any(path.endswith(".weight") and _is(host, path, table) for path in _replaced(host, name)):
        return
    rows, before = features(base_of(table))[0], _rows_of_base(host, table)
    if before is not None and before != rows:
        warnings.warn(
            f"save_pretrained: the embeddings have {rows} rows, those of the base model {before}, and the file of "
            f"{name!r} has no new rows; name the embeddings and the head in modules_to_save to train and keep them",
            stacklevel=3,
        )


def _replaced(host: Host, name: str) -> list[str]:
    return [path for method in host.methods(name) for path in method.overrides.paths]


def _is(host: Host, path: str, table: nn.Module) -> bool:
    return host.module(path.rpartition(".")[0]) is base_of(table)


def _rows_of_base(host: Host, table: nn.Module) -> int | None:
    """Rows that the embeddings had, by the base model's folder or else by the module that made them, if they tell."""
    config: Any = getattr(host.model, "config", None)
    folder = Path(getattr(config, "name_or_path", "") or "", "config.json")
    if getattr(config, "name_or_path", "") and folder.is_file():
        saved = json.loads(folder.read_text(encoding="utf-8"))
        size = saved.get("text_config", {}).get("vocab_size", saved.get("vocab_size"))
        return size if isinstance(size, int) else None
    # transformers' resize changes this attribute of the outermost model only.
    owners = [module for module in host.modules().values() if any(c is table for c in module._modules.values())]
    sizes = [getattr(owner, "vocab_size", None) for owner in owners]
    return next((size for size in sizes if isinstance(size, int)), None)
