"""The layers that a configuration targets, by PEFT's rules over canonical module names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol

from torch import nn

from ...nn.experts_nf4 import ExpertsNF4
from ...nn.functional_use import read_but_never_called
from ...nn.match import (
    Names,
    as_names,
    check_names,
    checked_pattern,
    contained_in,
    matches,
    matches_ending,
    nearest,
    number_after,
    unmatched,
)
from ...nn.module_tree import output_embeddings_of, unwrapped
from ..attention.torch_attention import SplitAttention
from ..layers.adapted_linear import base_of
from ..layers.base_layer import is_convolution, is_embedding, is_linear
from .injector import Injector
from .ties import paths_of_tied

# PEFT's defaults for target_modules None.
_DEFAULT_TARGETS: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): "llama mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 opt gptj gpt_neo bart stablelm",
    ("q", "v"): "t5 mt5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_proj", "value_proj"): "deberta-v2",
    ("query_key_value",): "bloom gpt_neox chatglm falcon",
}


class TargetConfig(Protocol):
    """The fields of a configuration that select the adapted layers."""

    @property
    def target_modules(self) -> Names | None:
        """Names or a regular expression of the layers to adapt."""

    @property
    def exclude_modules(self) -> Names | None:
        """Names or a regular expression of modules to leave out."""

    @property
    def layers_to_transform(self) -> list[int] | tuple[int, ...] | int | None:
        """Numbers of the layers to adapt; None = all layers."""

    @property
    def layers_pattern(self) -> list[str] | tuple[str, ...] | str | None:
        """Names of the lists of layers that the numbers refer to."""

    @property
    def heads(self) -> tuple[str, ...]: ...
    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task, such as "SEQ_CLS"."""


def matched_layers(
    injector: Injector, config: TargetConfig, *, embeddings: bool = False, convolutions: bool = False
) -> dict[str, nn.Module]:
    """Return the targeted linear layers by name, in the model's order.

    embeddings, convolutions: whether layers of these kinds may be targeted too.

    Raises ValueError, with the nearest names, if nothing matches, and if target_modules is None for an architecture
    without a default; TypeError if a name in target_modules matches another kind of layer.
    """
    _check(config)
    linears, targets = injector.linears(), _targets(injector, config)
    matched = {name: module for name, module in _named(injector, targets, config).items() if _in_layers(name, config)}
    if getattr(config, "ensure_weight_tying", False):
        matched |= _tied_to(matched, injector)
        # Embeddings come first, because the update of a tied head is derived from that of the embedding.
        matched = dict(sorted(matched.items(), key=lambda item: not is_embedding(item[1])))
    if not matched:
        raise ValueError(_no_match(targets, linears))
    unused = _never_called(injector)
    for name, module in matched.items():
        if module in unused:
            raise ValueError(
                f"target_modules: {name} must be called by the model, got a layer of which {unused[module]} reads the "
                "weight instead: an adapter on it would do nothing; leave it out"
            )
        served = is_linear(module) or (embeddings and is_embedding(module))
        if not served and not (convolutions and is_convolution(module)):
            *first, last = ["a linear layer"] + ["an nn.Embedding"] * embeddings + ["a convolution"] * convolutions
            wanted = f"{', '.join(first)} or {last}" if first else last
            raise TypeError(
                f"target_modules: {name} must be {wanted}, got {type(module).__name__}; name the layers inside it"
            )
    return matched


def check_target_names(injector: Injector, config: TargetConfig) -> None:
    """Raise ValueError if an item of target_modules, exclude_modules, layers_pattern or layers_to_transform matches
    nothing in the model.

    This check is for configurations written by users. A configuration from a file may list names of other models; the
    tensors of the file determine its layers, and each of them must match one.
    """
    _check(config)
    modules = [name for name in injector.modules(aliases=True) if name]
    listed = () if isinstance(config.target_modules, str) else config.target_modules or ()
    if lost := unmatched(listed, modules):
        raise ValueError(_no_match(lost, injector.linears()))
    if config.exclude_modules:
        kinds = (is_linear, is_embedding, is_convolution)
        layers = [name for name, module in injector.modules().items() if any(is_kind(module) for is_kind in kinds)]
        check_names("exclude_modules", config.exclude_modules, layers, of="a linear layer, embedding or convolution")
    for pattern in as_names(config.layers_pattern):
        if all(number_after(pattern, name) is None for name in modules):
            raise ValueError(
                f"layers_pattern: {pattern!r} must be followed by a layer's number in some module's name; "
                f"nearest names: {nearest([pattern], modules)}"
            )
    if wanted := layer_numbers(config):
        numbers = {_layer_of(name, config) for name in _named(injector, _targets(injector, config), config)}
        if missing := sorted(wanted - numbers):
            there = sorted(number for number in numbers if number is not None)
            raise ValueError(
                f"layers_to_transform: every number must be that of a targeted layer, got {missing}; there are {there}"
            )


def matched_parameters(injector: Injector, wanted: Names | None) -> dict[str, str]:
    """Return the parameters matched by target_parameters, as path -> path of the update in a file.

    PEFT nests a wrapper around the module for each of its parameters, in order, so that the names of all but the last
    contain `base_layer`. Raises ValueError for a name that matches nothing, and for parameters of the root module.
    """
    names = as_names(wanted)
    by_owner: dict[str, list[str]] = {}
    every = list(parameter_paths(injector))
    check_names("target_parameters", names, every, of="a parameter")
    for path in every:
        if matches(names, path):
            by_owner.setdefault(path.rpartition(".")[0], []).append(path)
    if "" in by_owner:
        raise ValueError(
            f"target_parameters: {by_owner['']} must belong to a module inside the model, not to the model"
        )
    return {
        path: owner + ".base_layer" * (len(paths) - 1 - number)
        for owner, paths in by_owner.items()
        for number, path in enumerate(paths)
    }


def parameter_paths(injector: Injector) -> Iterator[str]:
    """Return the paths of all parameters of the model, quantized experts included."""
    for owner, module in injector.modules().items():
        leaves = [leaf for leaf, parameter in module._parameters.items() if parameter is not None]
        leaves += [leaf for leaf, child in module._modules.items() if isinstance(child, ExpertsNF4)]
        yield from (f"{owner}.{leaf}" if owner else leaf for leaf in leaves)


def check_pattern_names(field: str, pattern: Mapping[str, object], targets: Collection[str]) -> None:
    """Raise ValueError if a key of rank_pattern or alpha_pattern matches none of the targets."""
    if lost := [key for key in pattern if not any(matches_ending(key, name) for name in targets)]:
        raise ValueError(
            f"{field}: every key must match a targeted layer, got {lost}; nearest names: {nearest(lost, targets)}"
        )


def _tied_to(matched: Collection[str], injector: Injector) -> dict[str, nn.Module]:
    modules = injector.modules(aliases=True)
    groups = paths_of_tied(modules)
    tied = (path.removesuffix(".weight") for name in matched for path in groups.get(f"{name}.weight", ()))
    layers = {name: modules[name] for name in tied if is_linear(modules[name]) or is_embedding(modules[name])}
    return {name: module for name, module in layers.items() if not called_instead(injector, name)}


def called_instead(injector: Injector, path: str) -> list[str]:
    """Return the embeddings that share the table of the embedding at `path` and are called instead of it.

    T5 has such embeddings in transformers 5, where each stack has an embedding tied to `shared`.
    """
    tied: Mapping[str, str] = getattr(injector.model, "all_tied_weights_keys", None) or {}
    users = [user.rpartition(".")[0] for user, source in tied.items() if source == f"{path}.weight"]
    called = [user for user in users if user != path and is_embedding(injector.module(user))]
    return called if is_embedding(injector.module(path)) else []


def is_all_linear(targets: Names | None) -> bool:
    """Whether target_modules is the keyword "all-linear", in any case."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def pattern_value(name: str, pattern: Mapping[str, int | float], default: float) -> float:
    """Return the value of the first key of rank_pattern or alpha_pattern that matches the name or a dotted ending of
    it.
    """
    for key, value in pattern.items():
        if matches_ending(key, name):
            return value
    return default


def _check(config: TargetConfig) -> None:
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field)
        if isinstance(value, str):
            checked_pattern(field, value)
    if isinstance(config.target_modules, str) and not is_all_linear(config.target_modules):
        for field in ("layers_to_transform", "layers_pattern"):
            if getattr(config, field) is not None:
                raise ValueError(f"{field}: must be None where target_modules is a regular expression")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern: must be None where layers_to_transform is None")


def _never_called(injector: Injector) -> dict[nn.Module, str]:
    """Return the layers that no forward calls -> the class that reads their weight. torch's attention is split
    before.
    """
    return {
        injector.model.get_submodule(name): holder
        for name, holder in read_but_never_called(injector.model).items()
        if holder != nn.MultiheadAttention.__name__
    }


def _targets(injector: Injector, config: TargetConfig) -> Names:
    """Return target_modules with "all-linear" and None replaced by names."""
    if is_all_linear(config.target_modules):
        heads, unused = _output_heads(injector, config.task_type), _never_called(injector)
        return [name for name, module in injector.linears().items() if name not in heads and module not in unused]
    return config.target_modules if config.target_modules is not None else _default_targets(injector.model)


def _named(injector: Injector, targets: Names, config: TargetConfig) -> dict[str, nn.Module]:
    """Return the modules that match `targets` and are neither excluded nor part of a head.

    A module with several names is included once, under the first name that matches.
    """
    left_out = config.exclude_modules or ()
    modules = injector.modules(aliases=True)
    spared = {id(m) for name, m in modules.items() if matches(left_out, name) or contained_in(config.heads, name)}
    named: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if name and matches(targets, name) and id(module) not in spared:
            named[name] = module
            spared.add(id(module))
    return named


def layer_numbers(config: TargetConfig) -> set[int]:
    """Return layers_to_transform as a set, which is empty if it restricts nothing."""
    wanted = config.layers_to_transform
    return {wanted} if isinstance(wanted, int) else set(wanted or ())


def _in_layers(name: str, config: TargetConfig) -> bool:
    wanted = layer_numbers(config)
    return not wanted or _layer_of(name, config) in wanted


def _layer_of(name: str, config: TargetConfig) -> int | None:
    """Return the number of the module's layer, by layers_pattern."""
    found = (number_after(pattern, name) for pattern in as_names(config.layers_pattern) or (r"[^.]*",))
    return next((number for number in found if number is not None), None)


def _output_heads(injector: Injector, task_type: str | None) -> set[str]:
    """Return the layers that 'all-linear' excludes: the output embedding, or the head of a classifier."""
    output = output_embeddings_of(injector.model)
    if output is not None:
        layer = base_of(unwrapped(output))
        return {name for name, module in injector.modules(aliases=True).items() if module is layer}
    heads = (head for head in ("score", "classifier") if hasattr(injector.model, head))
    return {next(heads, "")} if task_type == "SEQ_CLS" else set()


def _default_targets(model: nn.Module) -> tuple[str, ...]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for targets, model_types in _DEFAULT_TARGETS.items():
        if model_type in model_types.split():
            return targets
    if any(isinstance(module, SplitAttention) for module in model.modules()):
        return ("q_proj", "v_proj")
    raise ValueError(f"target_modules: must be given for a model of type {model_type or type(model).__name__!r}")


def _no_match(targets: Names, linears: Iterable[str]) -> str:
    if list(linears) == [""]:
        return "target_modules: the model must contain linear layers, got a single layer; use nn.Sequential(layer)"
    endings = sorted({name.rpartition(".")[2] for name in linears})
    asked = [targets] if isinstance(targets, str) else list(targets)
    rule = " (a string is a regular expression for the whole name)" if isinstance(targets, str) else ""
    return (
        f"target_modules: {targets!r} matches no module{rule}; nearest names: {nearest(asked, endings)}, "
        f"linear layers of this model: {endings}"
    )
