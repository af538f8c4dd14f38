"""Embedding tables of the base model, saved with an adapter because no other file has rows that were added by resizing.

PEFT saves the tables with the adapter if the vocabulary was resized or an embedding is adapted. When it loads a file
with tables, it copies them into the base model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...nn.module_tree import input_embeddings_of, output_embeddings_of, unwrapped
from ..layers.adapted_linear import AdaptedLinear, base_of
from ..layers.base_layer import is_linear, is_quantized

if TYPE_CHECKING:
    from .injector import Injector


def resized_tables(injector: Injector, base_model: str | None, replaced: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the tables of the input embedding and the output head, by path in a file, if their number of rows was
    changed.

    base_model: the folder or name of the base, if known; its configuration, or else the module that holds the
    embedding, gives the original number of rows.
    replaced: paths of parameters of which the adapter has copies, which are in the file anyway.
    """
    layers = _layers(injector)
    if not layers:
        return {}
    path, embedding = next(iter(layers.items()))
    rows = len(embedding.weight)
    holder: Any = injector.module(path.rpartition(".")[0])
    before = _stated_rows(base_model) or getattr(holder, "vocab_size", None)
    if not isinstance(before, int) or before == rows:
        return {}
    layers = {p: layer for p, layer in layers.items() if f"{p}.weight" not in replaced}
    if not layers:
        return {}
    warnings.warn(
        f"save_pretrained: the embeddings have {rows} rows, those of the base model {before}, and are saved with "
        "the adapter, whose base must be resized before it loads; name them in modules_to_save to train them",
        stacklevel=7,
    )
    names = {p: f"{p}.base_layer" if isinstance(injector.called_module(p), AdaptedLinear) else p for p in layers}
    with injector.selection.disabled():
        # Copied, because tensors of a file must not share memory.
        return {f"{names[p]}.weight": _dense(p, layer).detach().clone() for p, layer in layers.items()}


def _dense(path: str, layer: Any) -> Tensor:
    if is_quantized(layer):
        raise NotImplementedError(f"save: {path} must not be quantized after the vocabulary was resized")
    weight: Tensor = layer.weight
    return weight


def _layers(injector: Injector) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for table in (input_embeddings_of(injector.model), output_embeddings_of(injector.model)):
        layer = None if table is None else base_of(unwrapped(table))
        if layer is not None and (isinstance(layer, nn.Embedding) or is_linear(layer)):  # not an image embedding
            found |= {path: layer for path, module in injector.modules(aliases=True).items() if module is layer}
    return found


def _stated_rows(base_model: str | None) -> int | None:
    """Return vocab_size in the base model's config.json, if the base model is a local folder."""
    path = Path(base_model or "") / "config.json"
    if not base_model or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def pop_base_tables(injector: Injector, tensors: dict[str, Tensor], known: set[str]) -> dict[str, tuple[str, Tensor]]:
    """Remove the base model's parameters from a file's tensors, and return those that replace the base's as path ->
    (path in the file, value).

    known: paths of the adapter's own tensors. A table replaces the base's if most of its rows, from the start, equal
    the base's and all others differ, as in a vocabulary that was resized.
    Raises ValueError for any other table, because the adapter was then trained over another base.
    """
    modules = injector.modules(aliases=True)
    replacing: dict[str, tuple[str, Tensor]] = {}
    for key in sorted(tensors.keys() - known):
        path = injector.canonical(key)
        owner, _, leaf = path.rpartition(".")
        own = modules[owner]._parameters.get(leaf) if owner in modules else None
        if own is None:
            continue
        saved = tensors.pop(key)
        if saved.shape != own.shape:
            raise ValueError(
                f"adapter file: {key} must have the shape of the base model's own {leaf}, {list(own.shape)}, got "
                f"{list(saved.shape)}; if it is an embedding, call resize_token_embeddings on the base first"
            )
        differing = (saved.to(own) != own.detach()).reshape(own.shape[0] if own.dim() else 1, -1).any(1).tolist()
        new = sum(differing)
        if 2 * new >= len(differing) or any(differing[: len(differing) - new]):
            raise ValueError(f"adapter file: {key} must be the base model's own {leaf}, got other values")
        if new:
            replacing[path] = key, saved
    return replacing
