"""A folder's model without its weights: its modules, and the mapping from tensors in files to parameters.

transformers keeps the tensor names under which a model was published, and converts them while loading: the files of
Mixtral hold experts one by one, while the model has one stack, and Gemma 3's language model has another path. This
module uses the same mapping, so that quantizing, fine-tuning and loading agree. Everything is on the meta device, so
that a config.json cannot cause allocations before its sizes have been compared with the files.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..io.json_file import read_json_object
from ..nn.linear_nf4 import is_conv1d, is_nn_linear
from ..nn.match import Pattern, contained_in, is_skipped, nearest
from .file_names import name_map

CONFIG = "config.json"
LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""Options of every from_pretrained: no network, and no code from a model folder (None would ask at the terminal)."""
_COUNTS = re.compile(r"layers?$|^n_layer|blocks?$|experts|depths?$")
_BUFFERS = re.compile(
    r"(rotary_emb|maybe_rotary)\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$"
    r"|(^|\.)(attn|attention)\.(bias|masked_bias)$"
)
"""Constants that older versions of transformers saved with the weights; models compute them now."""
_MOST_PARTS = 4096
"""Maximum number of layers or experts; more than in any published model, and built in seconds."""


class ModelError(ValueError):
    """The path has no model that can be loaded. The message says what was expected."""


class ModelStructure:
    """The modules and parameters that a folder's config.json describes, without weights.

    model: on the meta device.   config: transformers' configuration, without a quantization_config.
    shapes: of the entries of the model's state dict, by name.
    Raises ModelError for a config.json that describes no causal language model of transformers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        values = read_json_object(folder / CONFIG)
        _require_bounded(values, folder / CONFIG)
        self.config, self.model = _build(folder)
        self.shapes: dict[str, torch.Size] = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        self._names = name_map(self.model)

    def linear_layers(self, skip: Pattern = ("lm_head",)) -> list[str]:
        """Return the names of the nn.Linear and Conv1D layers without those in `skip`; "lm_head" is the output head.

        A name in `skip` matches as in `replace_linear`: a layer, or a block that contains layers.

        The projection inside torch's MultiheadAttention is left out, because that module reads its weight itself.
        Raises ModelError if a name in `skip` matches no layer.
        """
        linears = {
            name: module for name, module in self.model.named_modules() if is_nn_linear(module) or is_conv1d(module)
        }
        if not isinstance(skip, str) and not callable(skip):
            head = self._output_head()
            skip = [head if item == "lm_head" and head else item for item in skip]
            if lost := [item for item in skip if not any(contained_in((item,), name) for name in linears)]:
                near = nearest(lost, linears)
                raise ModelError(f"skip: {lost[0]!r} matches no linear layer; did you mean one of {near}?")
        return [name for name, module in linears.items() if not is_skipped(skip, name, module)]

    def _output_head(self) -> str | None:
        """Return the name of the output head, which is `lm_head` in most models."""
        head = cast(Any, self.model).get_output_embeddings()
        return next((name for name, module in self.model.named_modules() if module is head), None)

    def is_transposed(self, layer: str) -> bool:
        """Whether the layer's weight is stored in the files as [in_features, out_features]."""
        return f"{layer}.weight" in self.shapes and is_conv1d(self.model.get_submodule(layer))

    def parameter_of(self, name: str) -> str | None:
        """Return the parameter that equals a tensor of the files; None if the tensor is combined with others or
        changed.
        """
        renamed, converted = self._names(name, self.shapes)
        return None if converted else renamed[0]

    def is_former_buffer(self, name: str, shape: Collection[int]) -> bool:
        """Whether a tensor of the files is a constant of old checkpoints without a counterpart in the model.

        Causal masks have four dimensions and their fill value has none; a bias that is a parameter has one.
        """
        if self._names(name, self.shapes)[0][0] in self.shapes:
            return False
        return bool(_BUFFERS.search(name)) and not (name.endswith("bias") and len(shape) == 1)

    def require_match(self, tensors: Mapping[str, Collection[int]]) -> None:
        """Raise ModelError, naming the tensors that are missing, unexpected or of another shape, if there are any.

        tensors: names and shapes of the tensors in the files.
        """
        found: set[str] = set()
        misshapen = []
        for name, shape in tensors.items():
            if self.is_former_buffer(name, shape):
                continue
            renamed, converted = self._names(name, self.shapes)
            found.update(renamed)
            want = self.shapes.get(renamed[0])
            if not converted and want is not None and torch.Size(shape) != want:
                misshapen.append(f"{name} is {list(shape)}, must be {list(want)}")
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        have = found | {name for pair in tied.items() if found & set(pair) for name in pair}
        missing = _without(parameters - have, getattr(self.model, "_keys_to_ignore_on_load_missing", None))
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None)
        unexpected = _without(found - self.shapes.keys(), ignored)
        require_nothing(self.folder, missing, unexpected, misshapen)


def require_nothing(
    folder: Path, missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str] = ()
) -> None:
    """Raise ModelError, naming the tensors that do not match between folder and model, unless there are none."""
    problems = []
    if lost := sorted(missing):
        problems.append(f"{_listed(lost)} {'is' if len(lost) == 1 else 'are'} missing")
    if others := sorted(unexpected):
        problems.append(f"got {_listed(others)} too")
    if wrong := sorted(misshapen):
        problems.append(_listed(wrong))
    if problems:
        raise ModelError(f"{folder}: must hold exactly the weights that its {CONFIG} describes: {'; '.join(problems)}")


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _without(names: set[str], patterns: Collection[str] | None) -> set[str]:
    return {name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())}


def _require_bounded(values: Any, place: Path, key: str = "") -> None:
    if isinstance(values, dict):
        for name, value in values.items():
            _require_bounded(value, place, name)
    elif isinstance(values, list):
        for value in values:
            _require_bounded(value, place, key)
    elif isinstance(values, int) and values > _MOST_PARTS and _COUNTS.search(key):
        raise ModelError(f"{place}: {key} must be at most {_MOST_PARTS}, got {values}")


def _build(folder: Path) -> tuple[Any, nn.Module]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with as_model_error(folder, f"{CONFIG} must describe a causal language model"):
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # otherwise transformers requires bitsandbytes
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model.config, cast(nn.Module, model)


@contextmanager
def as_model_error(path: Path, rule: str, passes: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Convert errors of transformers to ModelError: a folder may be untrusted, and its content can raise any error.

    passes: errors that have another cause and stay as they are.
    """
    try:
        yield
    except (ImportError, MemoryError, FloatingPointError, ModelError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except passes:
        raise
    except BaseException as error:  # panics of the tokenizers library are not Exceptions
        if "trust_remote_code" in str(error):  # its advice names an option that this package does not have
            raise ModelError(
                f"{path}: must hold a model that transformers itself implements; this folder's own code (auto_map in "
                "its JSON files) is never run"
            ) from error
        if "can't allocate memory" in str(error):  # raised by torch's allocator, and not caused by the folder
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"{path}: {rule}; {reason}") from error
