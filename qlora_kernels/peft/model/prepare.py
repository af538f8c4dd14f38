"""prepare_for_training: freeze a base model for adapters, with the casts that are requested and no others."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


def prepare_for_training(
    model: nn.Module,
    upcast: Literal["norms", "none", "all"] = "norms",
    gradient_checkpointing: Literal["non_reentrant", "reentrant", False] = "non_reentrant",
) -> nn.Module:
    """Freeze `model` in place, and return it.

    upcast: which fp16/bf16 parameters become fp32: those of normalisation layers, none, or all. PEFT's
    prepare_model_for_kbit_training converts all, including the embeddings and the head.
    A normalisation layer in fp32 returns its output in the dtype that the next layer expects, so that the model runs
    with and without autocast.
    gradient_checkpointing: needs a transformers model. "reentrant" also makes the embeddings' output require a
    gradient, which reentrant checkpointing needs to compute gradients.
    Raises ValueError for another value of `upcast` or `gradient_checkpointing`.
    """
    if upcast not in ("norms", "none", "all"):
        raise ValueError(f"prepare_for_training: upcast must be 'norms', 'none' or 'all', got {upcast!r}")
    if gradient_checkpointing not in ("non_reentrant", "reentrant", False):
        known = "'non_reentrant', 'reentrant' or False"
        raise ValueError(
            f"prepare_for_training: gradient_checkpointing must be {known}, got {gradient_checkpointing!r}"
        )
    model.requires_grad_(False)
    for module in model.modules():
        half = [parameter for parameter in module.parameters(recurse=False) if parameter.dtype in _HALF]
        if half and (upcast == "all" or (upcast == "norms" and _is_norm(module))):
            dtype = half[0].dtype
            for parameter in half:
                parameter.data = parameter.data.float()
            if upcast == "norms":
                module.register_forward_hook(partial(_return_narrow, dtype))
    if gradient_checkpointing:
        _checkpoint(model, reentrant=gradient_checkpointing == "reentrant")
    return model


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a LayerNorm, RMSNorm, GroupNorm or a model's own class with such a name."""
    return type(module).__name__.lower().endswith("norm")


def _return_narrow(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook that casts the output to the input's dtype, and without autocast at most to the width of `dtype`.

    Some models multiply the fp32 weight last, so that their output is fp32 for any input. Others cast the input to the
    weight's dtype first (Mamba, with residuals in fp32), so that an fp32 weight makes the next layer's input fp32.

    dtype: of the weight before it became fp32.
    """
    if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
        return output
    wanted = args[0].dtype
    if wanted == torch.float32 and not torch.is_autocast_enabled(output.device.type):
        wanted = dtype
    return output.to(wanted)


def _checkpoint(model: nn.Module, *, reentrant: bool) -> None:
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise NotImplementedError(
            f"prepare_for_training: {type(model).__name__} has no gradient_checkpointing_enable; pass "
            "gradient_checkpointing=False and call torch.utils.checkpoint in its forward"
        )
    hf = cast(Any, model)
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        hf.enable_input_require_grads()
