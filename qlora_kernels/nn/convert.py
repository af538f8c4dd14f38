"""replace_linear: quantize the linear layers of an existing model in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..format import nf4
from .describe import describe_quantization
from .experts_nf4 import ExpertsNF4, is_expert_stack
from .linear_nf4 import LinearNF4, is_conv1d, is_nn_linear
from .match import Pattern, check_names, checked_pattern, is_skipped, matches, nearest
from .module_tree import check_module, layers_of, move_hooks, set_submodule

ALL_LINEAR = "all-linear"
_NOT_AMONG_TARGETS = "not among targets"
_IN_SKIP = "in skip"


@dataclass
class ReplaceReport:
    """The result of `replace_linear`; str() gives a table.

    replaced: name -> (bytes before, bytes after).   skipped: name of a linear layer that was kept -> the reason.
    lost: name of a replaced layer -> hooks or other attributes that could not be moved to its replacement.
    """

    replaced: dict[str, tuple[int, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Return the bytes of the replaced weights in their own dtypes."""
        return sum(before for before, _ in self.replaced.values())

    @property
    def bytes_after(self) -> int:
        """Return the bytes of the packed indices and constants that replace them."""
        return sum(after for _, after in self.replaced.values())

    def __str__(self) -> str:
        width = max((len(name) for name in [*self.replaced, *self.skipped]), default=5)
        lines = [f"{'layer':<{width}}  {'before':>12}  {'after':>12}"]
        lines += [f"{name:<{width}}  {b:>12,}  {a:>12,}" for name, (b, a) in self.replaced.items()]
        lines += [f"{name:<{width}}  kept: {reason}" for name, reason in self.skipped.items()]
        lines += [f"{name:<{width}}  lost: {what}" for name, what in self.lost.items()]
        ratio = self.bytes_before / max(self.bytes_after, 1)
        lines.append(
            f"{len(self.replaced)} layers replaced: {self.bytes_before:,} -> {self.bytes_after:,} bytes ({ratio:.2f}x)"
        )
        return "\n".join(lines)


def replace_linear(
    model: nn.Module,
    skip: Pattern = ("lm_head",),
    targets: Pattern = ALL_LINEAR,
    blocksize: int = nf4.DEFAULT_BLOCKSIZE,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> ReplaceReport:
    """Replace linear layers (nn.Linear, transformers' Conv1D) of `model` by LinearNF4, in place, one at a time.

    targets: "all-linear"; or names and suffixes; or a regular expression for whole names; or a predicate of (name,
    module).
    skip: the same kinds; matching layers are kept, and so is every layer inside a matching block.
    blocksize, double_quant, compute_dtype: as for LinearNF4.
    progress: show a bar (needs tqdm).
    Linear layers that share one weight share one packed weight. A layer whose weight is also used elsewhere, such as an
    output head tied to the embedding, is kept, and the report says so. A module that the model has under several names
    is replaced, or kept, under all of them. Forward and backward hooks move to the new layer; the report lists what
    could not be moved.
    Raises ValueError if a name in targets or skip matches nothing in the model (the message gives the nearest layers;
    the default skip, "lm_head", may match nothing), if no layer is left to replace, or if `model` is itself a linear
    layer, which cannot be replaced in place; TypeError if an argument is of another kind. An error of the quantization
    of a weight is raised with the layer's name, before that layer is changed.
    """
    check_module("replace_linear", model)
    if is_plain_linear(model):
        raise ValueError(
            f"replace_linear: model must contain its linear layers, got a single {type(model).__name__}; use "
            "LinearNF4.from_linear, which returns a new layer"
        )
    skip, targets = checked_pattern("replace_linear: skip", skip), checked_pattern("replace_linear: targets", targets)
    report = ReplaceReport()
    modules = layers_of(model)
    linears, other_users = _linears_and_other_users(modules, report)
    if not callable(targets) and targets != ALL_LINEAR and not isinstance(targets, str):
        known = [
            name for name, module in modules.items() if isinstance(module, (nn.Linear, LinearNF4)) or name in linears
        ]
        check_names("replace_linear: targets", targets, known, of="a linear layer")
    _check_skip("replace_linear", skip, modules)
    chosen = _chosen(linears, other_users, skip, targets, report)
    if not chosen:
        raise ValueError(_nothing_matched(targets, skip, linears, report))
    made: dict[int, LinearNF4] = {}  # by id of the replaced module
    by_weight: dict[int, LinearNF4] = {}
    for name, module in _with_progress(chosen.items(), len(chosen), progress):
        weight = cast(torch.Tensor, module.weight)
        if id(module) in made:
            set_submodule(model, name, made[id(module)])
            report.replaced[name] = (0, 0)
            continue
        if weight.is_meta and hasattr(module, "_hf_hook"):
            raise ValueError(
                f"replace_linear: {name}: its weight must be in memory, got one that accelerate has offloaded; load "
                "the model without offloading, or in NF4 by QLoRAKernelsConfig"
            )
        try:
            layer = LinearNF4.from_linear(
                module, blocksize=blocksize, double_quant=double_quant, compute_dtype=compute_dtype
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"replace_linear: {name}: {error}") from error
        shared = by_weight.setdefault(id(weight), layer)
        if shared is not layer:
            layer.set_weight(shared.packed, shared.quant_state)
        made[id(module)] = layer
        move_hooks(module, layer)
        if "forward" in vars(module):
            report.lost[name] = "a forward that was set on the layer itself, as accelerate's hooks do"
        set_submodule(model, name, layer)
        report.replaced[name] = (weight.nbytes, layer.quant_state.nbytes) if shared is layer else (0, 0)
    describe_quantization(model)
    return report


def _linears_and_other_users(
    modules: Mapping[str, nn.Module], report: ReplaceReport
) -> tuple[dict[str, nn.Module], dict[int, str]]:
    """Return (linear layers by name, id of a parameter -> its name in a module that is not a linear layer).

    Stacks of experts are added to the report's skipped layers.
    """
    linears: dict[str, nn.Module] = {}
    other_users: dict[int, str] = {}
    for owner_name, owner in modules.items():
        if is_plain_linear(owner):
            linears[owner_name] = owner
            continue
        if isinstance(owner, LazyModuleMixin) and cast(Any, owner).has_uninitialized_params():
            raise ValueError(
                f"replace_linear: {owner_name or 'model'} must have a weight, got an uninitialized "
                f"{type(owner).__name__}; run the model once before it is quantized"
            )
        if isinstance(owner, nn.Linear):
            report.skipped[owner_name] = f"{type(owner).__name__}, a subclass of nn.Linear, may compute something else"
        for child, parameter in owner.named_parameters(recurse=False):
            parameter_name = f"{owner_name}.{child}" if owner_name else child
            if is_expert_stack(owner, parameter) and id(parameter) not in other_users:
                report.skipped[parameter_name] = "a stack of experts; see replace_experts"
            other_users[id(parameter)] = parameter_name
    return linears, other_users


def _chosen(
    linears: Mapping[str, nn.Module],
    other_users: Mapping[int, str],
    skip: Pattern,
    targets: Pattern,
    report: ReplaceReport,
) -> dict[str, nn.Module]:
    """Return the layers to replace by name; the report gets the reasons for the others."""
    chosen = {}
    kept_modules = {id(module) for name, module in linears.items() if is_skipped(skip, name, module)}
    wanted_modules = {
        id(module) for name, module in linears.items() if targets == ALL_LINEAR or matches(targets, name, module)
    }
    for name, module in linears.items():
        if id(module) not in wanted_modules:
            report.skipped[name] = _NOT_AMONG_TARGETS
        elif id(module) in kept_modules:
            report.skipped[name] = _IN_SKIP
        elif module._parameters.get("weight") is None:
            report.skipped[name] = "its weight is not a parameter; a hook such as weight_norm computes it"
        elif id(module.weight) in other_users:
            report.skipped[name] = f"its weight is tied to {other_users[id(module.weight)]}"
        else:
            chosen[name] = module
    return chosen


def replace_experts(
    model: nn.Module,
    skip: Pattern = (),
    blocksize: int = nf4.DEFAULT_BLOCKSIZE,
    double_quant: bool = True,
) -> ReplaceReport:
    """Replace the [experts, out, in] parameters of `model` (mixtures of experts) by ExpertsNF4, in place.

    skip: parameters to keep, or modules that hold them, as for `replace_linear`. A transformers model is switched to
    its plain loop over experts, the implementation that multiplies by one expert's weight at a time.
    Raises ValueError if the model has no such parameter, or if a name in skip matches nothing in the model; TypeError
    if an argument is of another kind. An error of the quantization is raised with the parameter's name.
    """
    check_module("replace_experts", model)
    skip = checked_pattern("replace_experts: skip", skip)
    report = ReplaceReport()
    _check_skip("replace_experts", skip, [*dict(model.named_modules()), *dict(model.named_parameters())])
    for owner_name, owner in list(model.named_modules()):
        for child, parameter in list(owner.named_parameters(recurse=False)):
            name = f"{owner_name}.{child}" if owner_name else child
            if not is_expert_stack(owner, parameter):
                continue
            if is_skipped(skip, name, owner):
                report.skipped[name] = "in skip"
                continue
            try:
                experts = ExpertsNF4.from_parameter(parameter, blocksize=blocksize, double_quant=double_quant)
            except (TypeError, ValueError) as error:
                raise type(error)(f"replace_experts: {name}: {error}") from error
            delattr(owner, child)
            setattr(owner, child, experts)
            report.replaced[name] = (parameter.nbytes, sum(buffer.nbytes for buffer in experts.buffers()))
    if not report.replaced:
        raise ValueError("replace_experts: model must contain [experts, out, in] parameters, got none to replace")
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    describe_quantization(model)
    return report


def _check_skip(op: str, skip: Pattern, names: Iterable[str]) -> None:
    if callable(skip) or skip in ("", "lm_head"):
        return
    wanted = skip if isinstance(skip, str) else [item for item in skip if item != "lm_head"]
    check_names(f"{op}: skip", wanted, [name for name in names if name])


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` is an nn.Linear or Conv1D, and not a subclass that may compute something else."""
    #     The subclass NonDynamicallyQuantizableLinear (out_proj of nn.MultiheadAttention) differs only in its name.
    kind = type(module)
    return kind is nn.modules.linear.NonDynamicallyQuantizableLinear or is_nn_linear(module) or is_conv1d(module)


def _nothing_matched(targets: Pattern, skip: Pattern, linears: Mapping[str, nn.Module], report: ReplaceReport) -> str:
    kept = {name: why for name, why in report.skipped.items() if why not in (_NOT_AMONG_TARGETS, _IN_SKIP)}
    if kept:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(kept.items())[:3])
        return f"replace_linear: targets must match a linear layer that can be replaced, got {targets!r}; {reasons}"
    if not linears:
        return "replace_linear: model must contain nn.Linear layers, got none"
    if callable(targets):
        hint = list(linears)[:5]
    else:
        hint = nearest([targets] if isinstance(targets, str) else targets, list(linears))
    return (
        f"replace_linear: targets must match a linear layer, got {targets!r} with skip={skip!r}, which leaves none of "
        f"{len(linears)}; did you mean one of {hint}?"
    )


def _with_progress(
    items: Iterable[tuple[str, nn.Module]], total: int, progress: bool
) -> Iterable[tuple[str, nn.Module]]:
    if not progress:
        return items
    from tqdm import tqdm

    return cast(Iterable[tuple[str, nn.Module]], tqdm(items, total=total, desc="quantizing", unit="layer"))
