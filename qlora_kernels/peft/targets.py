"""Which layers a configuration means: PEFT's matching rules over canonical module names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import nn

from .base_layer import is_embedding
from .host import Host
from .torch_attention import SplitAttention

# What PEFT adapts where target_modules is None.
_DEFAULT_TARGETS: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): "llama mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 opt gptj gpt_neo bart stablelm",
    ("q", "v"): "t5 mt5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_proj", "value_proj"): "deberta-v2",
    ("query_key_value",): "bloom gpt_neox chatglm falcon",
}

Names = list[str] | tuple[str, ...] | set[str] | str | None


class TargetConfig(Protocol):
    """The matching fields of LoraConfig and AdaLoraConfig."""

    @property
    def target_modules(self) -> Names: ...
    @property
    def exclude_modules(self) -> Names: ...
    @property
    def layers_to_transform(self) -> list[int] | tuple[int, ...] | int | None: ...
    @property
    def layers_pattern(self) -> list[str] | tuple[str, ...] | str | None: ...
    @property
    def heads(self) -> tuple[str, ...]: ...
    @property
    def task_type(self) -> str | None: ...


def matched_layers(host: Host, config: TargetConfig, *, embeddings: bool = False) -> dict[str, nn.Module]:
    """The linear layers, and with `embeddings` the embeddings, that `config` targets, by name, in the model's order.

    Raises ValueError where nothing matches (with the nearest names) and where target_modules is None for an
    architecture without a default; TypeError where a name in target_modules leads to another kind of layer.
    """
    _check(config)
    linears = host.linears()
    if is_all_linear(config.target_modules):
        targets: Names = [name for name in linears if name not in _output_heads(host.model, config.task_type)]
    else:
        targets = config.target_modules if config.target_modules is not None else _default_targets(host.model)
    matched = {n: module for n, module in host.modules().items() if n and _is_target(n, targets, config)}
    if not matched:
        raise ValueError(_no_match(targets, linears))
    for name, module in matched.items():
        if name not in linears and not (embeddings and is_embedding(module)):
            wanted = "a linear layer or nn.Embedding" if embeddings else "a linear layer"
            raise TypeError(
                f"target_modules: {name} must be {wanted}, got {type(module).__name__}; name the layers inside it"
            )
    return matched


def is_all_linear(targets: Names) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def matches(name: str, patterns: Names) -> bool:
    """A string is a regular expression for the whole name; a list holds names or their dotted endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns or ())


def pattern_value(name: str, pattern: Mapping[str, int | float], default: float) -> float:
    """rank_pattern and alpha_pattern: the value of the first key that matches the name or a dotted ending of it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _check(config: TargetConfig) -> None:
    if isinstance(config.target_modules, str) and not is_all_linear(config.target_modules):
        for field in ("layers_to_transform", "layers_pattern"):
            if getattr(config, field) is not None:
                raise ValueError(f"{field}: must be None where target_modules is a regular expression")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern: must be None where layers_to_transform is None")


def _is_target(name: str, targets: Names, config: TargetConfig) -> bool:
    if matches(name, config.exclude_modules):
        return False
    if any(re.match(rf"(^|.*\.){head}($|\..*)", name) for head in config.heads):
        return False
    return matches(name, targets) and _in_layers(name, config)


def _in_layers(name: str, config: TargetConfig) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted in ([], ()):
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The first numbered segment is the layer; a later one may be an expert.
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1]) in ({wanted} if isinstance(wanted, int) else set(wanted))
    return False


def _output_heads(model: nn.Module, task_type: str | None) -> set[str]:
    """What 'all-linear' leaves out: the output embedding of a language model, else the head of a classifier."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    output = get_output_embeddings() if callable(get_output_embeddings) else None
    if output is not None:
        return {Host.canonical(name) for name, m in model.named_modules() if m is output}
    return {next((h for h in ("score", "classifier") if hasattr(model, h)), "")} if task_type == "SEQ_CLS" else set()


def _default_targets(model: nn.Module) -> Names:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for targets, model_types in _DEFAULT_TARGETS.items():
        if model_type in model_types.split():
            return targets
    if any(isinstance(module, SplitAttention) for module in model.modules()):
        return ("q_proj", "v_proj")
    raise ValueError(f"target_modules: must be given for a model of type {model_type or type(model).__name__!r}")


def _no_match(targets: Names, linears: Iterable[str]) -> str:
    endings = sorted({name.rpartition(".")[2] for name in linears})
    asked = [targets] if isinstance(targets, str) else list(targets or ())
    near = {n for a in asked for n in difflib.get_close_matches(a.rpartition(".")[2], endings, n=3, cutoff=0.4)}
    return (
        f"target_modules: {targets!r} matches no module; nearest names: {sorted(near) or endings}, "
        f"linear layers of this model: {endings}"
    )
