"""from_bnb and to_bnb: conversion of a model's layers between bitsandbytes' Linear4bit and LinearNF4.

Both directions reuse the packed indices and the constants, so that the values of the weights stay the same bit for bit.
Checkpoints need no conversion: see docs/huggingface.md.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from ..format import bnb_layout
from ..format.quant_state import QuantState
from ..nn.describe import describe_quantization
from ..nn.linear_nf4 import LinearNF4
from ..nn.module_tree import layers_of, move_hooks, set_submodule
from ..peft.layers.foreign_layer import in_cpu_format


def from_bnb(model: nn.Module) -> nn.Module:
    """Replace every Linear4bit of `model` by a LinearNF4, in place; returns the model.

    A weight that several layers share stays shared. The config of a transformers model that bitsandbytes had quantized
    is changed to this package's, and the model is saved as such.
    Raises ValueError, before anything is changed, if a layer is not in NF4 (FP4 has another code, and 8-bit layers
    other arithmetic), is not quantized yet, or if the model has no Linear4bit.
    """
    _require_module("from_bnb", model)
    layers = {name: module for name, module in layers_of(model).items() if isinstance(module, _KINDS)}
    if not layers:
        raise ValueError("from_bnb: model must contain bitsandbytes.nn.Linear4bit layers, got none")
    made: dict[int, LinearNF4] = {}
    by_weight: dict[int, LinearNF4] = {}
    for name, layer in layers.items():
        if id(layer) not in made:
            made[id(layer)] = _from_linear4bit(name, layer, by_weight)
    for name, layer in layers.items():
        move_hooks(layer, made[id(layer)])
        set_submodule(model, name, made[id(layer)])
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        cast(Any, model).is_loaded_in_4bit = False
    describe_quantization(model)
    return model


def to_bnb(model: nn.Module) -> nn.Module:
    """Replace every LinearNF4 of `model` by a bitsandbytes Linear4bit, in place; returns the model.

    Raises ValueError if the model has no LinearNF4.
    """
    _require_module("to_bnb", model)
    layers = {name: module for name, module in layers_of(model).items() if isinstance(module, LinearNF4)}
    if not layers:
        raise ValueError("to_bnb: model must contain LinearNF4 layers, got none")
    made: dict[int, nn.Module] = {}
    by_packed: dict[int, Any] = {}
    for name, layer in layers.items():
        if id(layer) not in made:
            made[id(layer)] = _to_linear4bit(layer, by_packed)
            move_hooks(layer, made[id(layer)])
        set_submodule(model, name, made[id(layer)])
    _describe_as_bitsandbytes(model)
    return model


def _require_module(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{op}: model must be an nn.Module, got {type(model).__name__}; a folder loads with "
            "qlora_kernels.integrations.transformers.load_model"
        )


def _describe_as_bitsandbytes(model: Any) -> None:
    """Make a transformers model save and load as one that bitsandbytes has quantized."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    ours = quantizer.quantization_config
    dense = [name for name, module in layers_of(model).items() if type(module) is nn.Linear]
    dtype = ours.compute_dtype or model.dtype
    values = bnb_layout.quantization_config(ours.double_quant, dtype, dense)
    quantizer.remove_quantization_config(model)
    model.config.quantization_config = BitsAndBytesConfig.from_dict(values)
    model.hf_quantizer = Bnb4BitHfQuantizer(model.config.quantization_config, pre_quantized=True)
    model.is_quantized = model.is_loaded_in_4bit = True
    model.quantization_method = model.config.quantization_config.quant_method


_KINDS = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def _from_linear4bit(name: str, layer: Any, by_weight: dict[int, LinearNF4]) -> LinearNF4:
    if isinstance(layer, bnb.nn.Linear8bitLt):
        raise ValueError(f"from_bnb: {name} must be a Linear4bit, got 8-bit weights; load the model in 4 bits or dense")
    state: Any = getattr(layer.weight, "quant_state", None)
    kind = layer.weight.quant_type if state is None else state.quant_type
    if kind != "nf4":
        raise ValueError(
            f"from_bnb: {name} must be in NF4, got {kind!r}; its values are not NF4 values: load the model with "
            "bnb_4bit_quant_type='nf4', or quantize the dense model with replace_linear"
        )
    if state is None:
        raise ValueError(f"from_bnb: {name} must be quantized, got a weight that was never moved to a device")
    compute_dtype = layer.compute_dtype if layer.compute_type_is_set else None
    shared = by_weight.get(id(layer.weight))
    if shared is not None:
        packed, quant_state = shared.packed, shared.quant_state
    else:
        packed, quant_state = _cpu_format(layer) if in_cpu_format(state) else _common_format(name, layer)
    made = LinearNF4.from_quantized(packed, quant_state, like=layer, compute_dtype=compute_dtype)
    made.dense_class = getattr(layer, "source_cls", nn.Linear)
    by_weight.setdefault(id(layer.weight), made)
    return made


def _common_format(name: str, layer: Any) -> tuple[Tensor, QuantState]:
    tensors = {key.removeprefix("weight."): t for key, t in layer.state_dict().items() if key.startswith("weight.")}
    state = bnb_layout.decode(f"{name}.weight", tensors).to(layer.weight.device)
    return layer.weight.data.reshape(-1).view(torch.uint8).reshape(-1, 1), state


def _cpu_format(layer: Any) -> tuple[Tensor, QuantState]:
    """Return the state of a layer that ran in eval mode on an AVX512-BF16 CPU, which keeps its scales in bfloat16."""
    state = layer.weight.quant_state
    absmax = state.absmax.T.flatten().float()
    common = copy.deepcopy(layer)
    common.state_dict()  # restores the common order of the indices
    packed = common.weight.data.reshape(-1).view(torch.uint8).reshape(-1, 1)
    return packed, QuantState(state.shape, state.original_dtype, state.blocksize, absmax)


def _to_linear4bit(layer: LinearNF4, by_packed: dict[int, Any]) -> nn.Module:
    made: Any = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=layer.compute_dtype,
        compress_statistics=layer.absmax_q is not None,
        quant_type="nf4",
        device="meta",
    )
    weight = by_packed.get(id(layer.packed))
    if weight is None:
        stats = {f"weight.{suffix}": tensor.clone() for suffix, tensor in bnb_layout.encode(layer.quant_state).items()}
        weight = bnb.nn.Params4bit.from_prequantized(
            data=layer.packed.clone(), quantized_stats=stats, requires_grad=False, device=layer.packed.device
        )
        by_packed[id(layer.packed)] = weight
    made.weight = weight
    made.quant_state = weight.quant_state
    made.bias = layer.bias
    made.source_cls = layer.dense_class
    return cast(nn.Module, made.train(layer.training))
