"""Transformers models with NF4 layers: their quantization config and the names of their tensors in files.

The integration with transformers is imported by name, and only for transformers models, because nn does not depend on
it.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn


def describe_quantization(model: nn.Module) -> None:
    """Set the config of a transformers model to describe its NF4 layers; other modules are not changed."""
    if _is_of_transformers(model):
        _integration("model_description").describe(model)


def write_description(model: nn.Module, folder: Path) -> None:
    """Write config.json and generation_config.json of a transformers model; nothing for other modules."""
    if _is_of_transformers(model):
        _integration("model_description").write_config(model, folder)


def file_names_of(model: nn.Module, known: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Return name in the model -> name in the files.

    known: names of weights and buffers in the model.   names: in the files; those of modules that are not transformers'
    are the names in the model.
    """
    if _is_of_transformers(model):
        found: dict[str, str] = _integration("file_names").names_in_model(model, known, names)
        return found
    return {name: name for name in names}


def _is_of_transformers(model: nn.Module) -> bool:
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(model).__mro__
    )


def _integration(module: str) -> Any:
    return importlib.import_module(f"qlora_kernels.integrations.{module}")
