"""fuse_model: runs the parts between the linear layers of a transformers model on this package's ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

from torch import nn

from .fused_attention import FusedAttention, FusedAttentionAlone, FusedRotation, attention_form
from .fused_causal_lm import FusedCausalLM, causal_lm_form
from .fused_mlp import FusedMLP, activation_of
from .fused_module import FusedModule, fused_class, unfused_class
from .fused_norm import FusedDecoderLayer, FusedGemmaRMSNorm, FusedLlamaRMSNorm, FusedSandwichDecoderLayer
from .known_forms import form_of
from .module_tree import check_module, layers_of

_LLAMA_NORM = "2f05a2fae1d38000"
_GEMMA_NORM = {"forward": "35639ded1041c22e", "_norm": "9932f706ea6b5ac7"}
_MLP = "640a210159f212b6"
_DECODER_LAYERS: dict[str | None, type[FusedModule]] = {
    "88f91138c39e7c7b": FusedDecoderLayer,
    "79922dcc9fa512d9": FusedSandwichDecoderLayer,
}
"""Forms of forward methods (known_forms.py), as in transformers 5.24."""

_UNKNOWN = "the code of its forward is not one of the known forms"


class Replacement(NamedTuple):
    """One kind of module that fuse_model replaces.

    part: the argument of fuse_model that enables it.   resembles: whether the report mentions a module at all.
    choose: returns the mixin for a module, or the reason why it is left alone.
    """

    part: str
    resembles: Callable[[nn.Module], bool]
    choose: Callable[[nn.Module], type[FusedModule] | str]


@dataclass
class FuseReport:
    """The result of `fuse_model`; str() gives a table.

    replaced: name of a module -> the ops it runs on now.   skipped: name -> the reason why it was left alone.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _modules: list[tuple[str, ref[nn.Module]]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Restore the classes of the modules that this call replaced. Raises RuntimeError as unfuse_model does."""
        _unfuse((name, module) for name, reference in self._modules if (module := reference()) is not None)
        self._modules.clear()

    def __str__(self) -> str:
        width = max((len(name) for name in [*self.replaced, *self.skipped]), default=5)
        lines = [f"{name:<{width}}  {what}" for name, what in self.replaced.items()]
        lines += [f"{name:<{width}}  kept: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([*lines, f"{len(self.replaced)} modules fused, {len(self.skipped)} left alone"])


def fuse_model(
    model: nn.Module,
    *,
    norms: bool = True,
    rope: bool = True,
    attention: bool = True,
    mlp: bool = True,
    loss: bool = True,
) -> FuseReport:
    """Run norms, rotary embedding, attention, gated MLPs and the loss of a transformers model fused, in place.

    model: of the Llama, Qwen2, Qwen3, Mistral, Gemma, Gemma 2, Gemma 3 or SmolLM families, before or after adapters are
    added and its linear layers are quantized. Modules of other models with the same code are replaced too.
    norms: RMSNorm, and the residual addition in front of the MLP.   rope: rotary embedding in attention.
    attention: attention in training and prefill on a CPU, if the model's implementation is "sdpa" and its mask gives
    each query a contiguous range of keys.   mlp: the product of activation and gate.
    loss: output head and loss in one op. The output of a model in training mode that is called with labels then has
    logits=None, which saves their memory; pass skip_logits=False to get logits.
    Modules keep their parameters, names, hooks and state dicts, and saved files do not change. A module whose code or
    attributes differ from those that its replacement computes is left alone, and the report gives the reason. Outputs
    change by the roundings that the fused ops omit (docs/fuse_model.md). A second call changes nothing.
    Returns a FuseReport; its undo(), or unfuse_model(model), reverses the call.
    Raises TypeError if `model` is no module.
    """
    check_module("fuse_model", model)
    report = FuseReport()
    seen: set[int] = set()
    parts = {"norms": norms, "attention": rope or attention, "mlp": mlp, "loss": loss}
    for name, module in layers_of(model).items():
        for replacement in REPLACEMENTS:
            if not parts[replacement.part] or not replacement.resembles(module):
                continue
            if id(module) in seen:  # under another name
                report.replaced[name] = type(module).__mro__[1].__name__
            elif (mixin := _choice(replacement, module)) is None or isinstance(mixin, str):
                report.skipped[name] = mixin or "fused already"
            else:
                if mixin is FusedAttention:
                    mixin = _ATTENTION[rope, attention]
                _extend(module, mixin)
                seen.add(id(module))
                report.replaced[name] = mixin.__name__
                report._modules.append((name, ref(module)))
    return report


def unfuse_model(model: nn.Module) -> list[str]:
    """Restore the original class of every module that fuse_model replaced, and return their names.

    Raises RuntimeError, naming the modules, if another library, such as FSDP, has extended a fused class since; all
    other modules are restored.
    """
    return _unfuse(layers_of(model).items())


def _unfuse(modules: Any) -> list[str]:
    restored, stuck = [], []
    for name, module in modules:
        if not isinstance(module, FusedModule):
            continue
        plain: Any = unfused_class(type(module))
        if plain is None:
            stuck.append(name)
        else:
            module.__class__ = plain
            restored.append(name)
    if stuck:
        raise RuntimeError(
            f"unfuse_model: the class of a fused module must be the one that fuse_model gave it, got another one on "
            f"{', '.join(stuck)}; undo what was done to the model after fuse_model first"
        )
    return restored


def _choice(replacement: Replacement, module: nn.Module) -> type[FusedModule] | str | None:
    if isinstance(module, FusedModule):
        return None
    if "forward" in vars(module):
        return "a forward was set on the module itself, as accelerate's hooks and kernelize() do"
    return replacement.choose(module)


def _extend(module: Any, mixin: Any) -> None:
    own: Any = type(module)
    module.__class__ = fused_class(mixin, own)


def _is_norm(module: nn.Module) -> bool:
    return any(kind.__name__.endswith("RMSNorm") for kind in type(module).__mro__)


def _norm(module: nn.Module) -> type[FusedModule] | str:
    kind: Any = type(module)
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 1:
        return "it has no one-dimensional weight"
    form = form_of(kind.forward)
    if form == _LLAMA_NORM and isinstance(getattr(module, "variance_epsilon", None), float):
        return FusedLlamaRMSNorm
    if form == _GEMMA_NORM["forward"] and form_of(getattr(kind, "_norm", _norm)) == _GEMMA_NORM["_norm"]:
        return FusedGemmaRMSNorm if isinstance(getattr(module, "eps", None), float) else "its eps is no float"
    return _UNKNOWN


def _is_decoder_layer(module: nn.Module) -> bool:
    return {"self_attn", "input_layernorm"} <= module._modules.keys()


def _decoder_layer(module: nn.Module) -> type[FusedModule] | str:
    kind: Any = type(module)
    return _DECODER_LAYERS.get(form_of(kind.forward), _UNKNOWN)


def _is_mlp(module: nn.Module) -> bool:
    return {"gate_proj", "up_proj", "down_proj"} <= module._modules.keys()


def _mlp(module: nn.Module) -> type[FusedModule] | str:
    kind: Any = type(module)
    if form_of(kind.forward) != _MLP:
        return _UNKNOWN
    act_fn = getattr(module, "act_fn", None)
    return FusedMLP if activation_of(act_fn) else f"its activation is {type(act_fn).__name__}, not SiLU or GELUTanh"


def _is_attention(module: nn.Module) -> bool:
    return {"q_proj", "k_proj", "v_proj", "o_proj"} <= module._modules.keys()


def _attention(module: nn.Module) -> type[FusedModule] | str:
    return FusedAttention if attention_form(type(module)) is not None else _UNKNOWN


def _is_causal_lm(module: nn.Module) -> bool:
    return {"model", "lm_head"} <= module._modules.keys() and type(module).__name__.endswith("ForCausalLM")


def _causal_lm(module: nn.Module) -> type[FusedModule] | str:
    return FusedCausalLM if causal_lm_form(type(module)) is not None else _UNKNOWN


REPLACEMENTS = (
    Replacement("norms", _is_norm, _norm),
    Replacement("norms", _is_decoder_layer, _decoder_layer),
    Replacement("attention", _is_attention, _attention),
    Replacement("mlp", _is_mlp, _mlp),
    Replacement("loss", _is_causal_lm, _causal_lm),
)
_ATTENTION: dict[tuple[bool, bool], type[FusedModule]] = {
    (True, True): FusedAttention,
    (True, False): FusedRotation,
    (False, True): FusedAttentionAlone,
}
"""The attention mixin for each combination of the arguments rope and attention of fuse_model."""
