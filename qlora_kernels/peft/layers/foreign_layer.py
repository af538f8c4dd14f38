"""Linear layers of other libraries: reads their weight as their forward uses it, or gives the reason why it cannot.

bitsandbytes' Linear4bit and Linear8bitLt are subclasses of nn.Linear whose `weight` holds codes. They are recognized by
the class of that weight, so that bitsandbytes need not be installed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.describe import describe_quantization


def is_bitsandbytes(module: nn.Module) -> bool:
    """Return whether `module` holds a weight that bitsandbytes has quantized, which it does when the layer is moved to
    a device.
    """
    weight: Any = module._parameters.get("weight")
    kind = type(weight).__name__
    return (kind == "Params4bit" and weight.quant_state is not None) or (
        kind == "Int8Params" and not weight.is_floating_point()
    )


def weight_unreadable(linear: nn.Linear) -> str | None:
    """Return the reason why `linear.weight` is not the W of y = x W^T + bias, or None if it is."""
    weight = linear.weight
    if not weight.is_floating_point() or weight.element_size() == 1:
        return f"its weight holds codes in {weight.dtype}"
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        return None
    # The common case comes first, so that torch.compile traces no further.
    if type(weight) not in (Tensor, nn.Parameter) and not type(weight).__module__.startswith("torch."):
        return f"its weight is a {type(weight).__name__}"
    if type(linear) is not nn.Linear and type(linear).forward is not nn.Linear.forward and not _is_affine(linear):
        return "its forward is not that of nn.Linear"
    return None


_GIVES_ROWS: dict[type[nn.Module], bool] = {}


@torch.no_grad()
def gives_rows(linear: nn.Linear) -> bool:
    """Return whether a trial call of the layer returns a tensor [..., N]; routers derived from nn.Linear return more.

    A layer whose forward raises, as a quantized layer may on this device, counts as a linear layer.
    """
    kind = type(linear)
    if kind.forward is nn.Linear.forward:
        return True
    if kind not in _GIVES_ROWS:
        x = torch.zeros(2, linear.in_features, dtype=torch.float32, device=linear.weight.device)
        try:
            y = linear.forward(x.to(linear.weight.dtype) if linear.weight.is_floating_point() else x)
        except Exception:  # other libraries may raise any error
            return True
        _GIVES_ROWS[kind] = isinstance(y, Tensor) and y.shape == (2, linear.out_features)
    return _GIVES_ROWS[kind]


@torch.no_grad()
def _is_affine(linear: nn.Linear) -> bool:
    """Return whether a trial call of a subclass with its own forward, such as Falcon's, gives y = x W^T + bias."""
    weight = linear.weight
    x = torch.linspace(-1, 1, 2 * linear.in_features, dtype=torch.float32, device=weight.device)
    x = x.cos().view(2, -1).to(weight.dtype)
    try:
        y = linear.forward(x)
    except (RuntimeError, TypeError, ValueError):
        return False
    expected = F.linear(x, weight, linear.bias)
    # Roundings may differ; a layer that computes something else exceeds this bound by far.
    size = F.linear(x.abs().float(), weight.abs().float()) + 1
    rounding = 8 * torch.finfo(weight.dtype).eps
    return isinstance(y, Tensor) and y.shape == expected.shape and bool(((y - expected).abs() <= rounding * size).all())


def bitsandbytes_weight(linear: nn.Linear) -> Tensor:
    """Return the weight [N, K] in fp32 of a layer for which is_bitsandbytes holds. The layer is not changed."""
    weight: Any = linear.weight
    if type(weight).__name__ == "Int8Params":
        state: Any = linear.state
        codes, scales = (weight.CB, weight.SCB) if weight.CB is not None else (state.CB, state.SCB)
        return codes.float() * (scales.view(-1, 1) / 127.0)  # type: ignore[no-any-return]
    state = weight.quant_state
    absmax = _absmax(state)
    if in_cpu_format(state):
        common = copy.deepcopy(linear)
        common.state_dict()  # restores the common order of the indices, but not always that of absmax
        weight = common.weight
    packed = weight.data.view(torch.uint8).flatten()
    indices = torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten()[: state.shape.numel()]
    values: Tensor = state.code.float()[indices.int()]
    return (values * absmax.repeat_interleave(state.blocksize)[: values.numel()]).view(state.shape)


def _absmax(state: Any) -> Tensor:
    """Return the absmax of each block of a Linear4bit's weight, fp32, in row-major order."""
    if in_cpu_format(state):
        return state.absmax.T.flatten().float()  # type: ignore[no-any-return]
    if not state.nested:
        return state.absmax.flatten().float()  # type: ignore[no-any-return]
    scales = state.state2.absmax.float().repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    return state.state2.code.float()[state.absmax.flatten().int()] * scales + state.offset  # type: ignore[no-any-return]


def in_cpu_format(state: Any) -> bool:
    """Return whether the layer has run in eval mode on a CPU with AVX512-BF16, so that absmax is stored as [block,
    row].
    """
    return bool(getattr(state, "packing_format_for_cpu", False))


def forget_quantization(model: nn.Module) -> None:
    """Update the quantization settings of a transformers model after layers became dense, so that it saves and reloads.

    If no quantized layer is left, the settings are removed. Otherwise the dense layers are listed as those that loading
    must not quantize.
    """
    describe_quantization(model)
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if config is None or quantizer is None or not hasattr(config, "llm_int8_skip_modules"):
        return
    if any(is_bitsandbytes(module) for module in model.modules()):
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        config.llm_int8_skip_modules = [name for name, module in linears.items() if not is_bitsandbytes(module)]
        return
    quantizer.remove_quantization_config(model)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, flag):
            setattr(model, flag, False)
