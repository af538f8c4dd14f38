"""Saving adapters to folders and loading them. A combination of methods is a folder of folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...io.peft_checkpoint import AdapterFiles, read_adapters, write_adapters
from ...nn.quantized_weight import is_sharded
from ..core.config import PeftConfig
from ..core.sharded import full_tensors, write_on_rank_zero
from .base_tables import resized_tables
from .injector import Injector
from .method import Method
from .registry import config_from_dict, method_for

_ABOUT_THE_RUN = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}
"""Fields of adapter_config.json that do not change what the adapter computes."""


def save_adapters(adapters: Mapping[str, Sequence[Method]], directory: str | os.PathLike[str]) -> None:
    """Write all adapters as one change. adapters: path relative to the directory ("." for itself) -> adapter.

    If parameters are sharded, every process must call this function; rank 0 writes.
    Raises NotImplementedError if only states of a method are sharded, and the parameters are not.
    """
    folders: dict[str, AdapterFiles | Sequence[str]] = {}
    for folder, methods in adapters.items():
        for method in methods:
            method.before_save()
        if len(methods) == 1:
            folders[folder] = _files(methods[0])
            continue
        parts = {f"{i}_{method.config.peft_type.lower()}": method for i, method in enumerate(methods)}
        folders[folder] = list(parts)
        folders |= {str(Path(folder, part)): _files(method) for part, method in parts.items()}
    if any(is_sharded(p) for methods in adapters.values() for m in methods for p in m.parameters()):
        for files in folders.values():
            if isinstance(files, AdapterFiles):
                files.tensors, files.extra_tensors = full_tensors(files.tensors), full_tensors(files.extra_tensors)
        write_on_rank_zero(lambda: write_adapters(directory, folders))
    elif any(is_sharded(t) for f in folders.values() if isinstance(f, AdapterFiles) for t in f.extra_tensors.values()):
        raise NotImplementedError(
            "save_pretrained: state_dict must be None for a sharded method with states of its own, such as AdaLoRA, "
            "which every process has to gather; call save_pretrained(folder) in every process"
        )
    else:
        write_adapters(directory, folders)


def _files(method: Method) -> AdapterFiles:
    values, tensors = method.extras()
    # As in PEFT, so that other programs find the base: its name in the configuration, or the folder or hub id from
    # which transformers loaded it, which is "" for a model that was not loaded.
    base_model = method.config.base_model_name_or_path or getattr(method.injector.model, "name_or_path", "") or None
    tables = resized_tables(method.injector, base_model, method.overrides.paths)
    return AdapterFiles(
        config={**method.file_config(), "base_model_name_or_path": base_model},
        tensors={**{f"{method.file_prefix}{key}": table for key, table in tables.items()}, **method.tensors()},
        extras={"loads_in_peft": method.loads_in_peft, **values},
        extra_tensors=tensors,
    )


def load_adapter(directory: str | os.PathLike[str]) -> list[tuple[PeftConfig, AdapterFiles]]:
    """Return the methods that an adapter's folder describes, each with the files for `load_weights`, all from one state
    of the folder.
    """
    return [(_config(files), files) for files in read_adapters(directory)]


def _config(files: AdapterFiles) -> PeftConfig:
    """Return adapter_config.json, updated with the fields of our sidecar file."""
    own = (files.extras or {}).get("config", {})
    if not isinstance(own, dict):
        raise ValueError(f"adapter's sidecar: config must be an object, got {own!r}")
    return config_from_dict({**files.config, **own})


def buildable(config: PeftConfig, files: AdapterFiles, injector: Injector) -> PeftConfig:
    """Return the configuration with which the method is built before `load_weights` fills it.

    Raises ValueError if it requires more than the files hold.
    """
    method = method_for(config)
    config = method.fitted_to_file(method.config_of_file(config), injector, files.tensors)
    method.check_file(config, injector, files.tensors, files.extra_tensors)
    return config


def require_same_configs(name: str, methods: Sequence[Method], files: Sequence[AdapterFiles]) -> None:
    """Raise ValueError if the files belong to an adapter with another configuration than `methods`."""
    kinds = [method.config.peft_type for method in methods]
    found = [contents.config.get("peft_type") for contents in files]
    different = {} if kinds == found else {"peft_type": found}
    for method, contents in zip(methods, files, strict=False):
        own = json.loads(json.dumps(method.file_config()))
        for field in own.keys() & contents.config.keys() - _ABOUT_THE_RUN - method.trained_fields:
            if _unordered(own[field]) != _unordered(contents.config[field]):
                different[field] = contents.config[field]
    if different:
        raise ValueError(
            f"load_adapter: the folder of an adapter that the model has already, {name!r}, must be of the same "
            f"configuration, got another {different}; use another name, or delete_adapter first"
        )


def _unordered(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, list) else value


def load_weights(methods: Sequence[Method], files: Sequence[AdapterFiles], *, is_trainable: bool) -> None:
    """Load the files that `load_adapter` returned, one entry for each method."""
    for method, contents in zip(methods, files, strict=True):
        method.load_tensors(contents.tensors)
        if contents.extras is not None:
            method.load_extras(contents.extras, contents.extra_tensors, is_trainable=is_trainable)
