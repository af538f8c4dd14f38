"""The mapping from the names of tensors in a transformers model's files to those of its parameters.

transformers keeps the names under which a model was published, renames them while loading, and joins some tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..format.bnb_layout import SUFFIXES
from ..nn.quantized_weight import TENSORS

_ENDS = tuple(f".{suffix}" for suffix in (*SUFFIXES, *TENSORS))
"""What follows the name of an NF4 weight in the names of its tensors."""


def name_map(model: Any) -> Any:
    """Return a function: (name in the files, names of the model) -> (names in the model, whether it is converted)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}

    def names(name: str, known: Mapping[str, object]) -> tuple[list[str], bool]:
        prefix = model.base_model_prefix
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = name, None  # it already has its name in the model
        if pattern is None:
            return [renamed], False
        targets = by_pattern[pattern].target_patterns
        return [renamed, *(renamed.replace(targets[0], target) for target in targets[1:])], True

    return names


def names_in_model(model: Any, known: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Return name in the model -> name in the files, without tensors that transformers joins or changes.

    known: names of weights and buffers in the model.   names: in the files, where the tensors of an NF4 weight
    are named after it.
    """
    renamed_of, shapes = name_map(model), dict.fromkeys(known)
    found = {}
    for name in names:
        weight, suffix = _split(name, shapes)
        renamed, converted = renamed_of(weight, shapes)
        if not converted:
            found[renamed[0] + suffix] = name
    return found


def _split(name: str, known: Mapping[str, object]) -> tuple[str, str]:
    """Return the name of the weight to which a tensor belongs, and the rest of its name."""
    if name not in known:
        for end in _ENDS:
            weight = name.removesuffix(end)
            if weight != name:
                return weight, end
    return name, ""
