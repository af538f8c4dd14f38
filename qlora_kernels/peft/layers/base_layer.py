"""The base-layer protocol: the interface of a linear layer for methods, independent of how its weight is stored.

A base layer has in_features, out_features, bias and forward. A quantized layer also has dequantize(dtype) -> [N, K],
and a layer with a fused low-rank path forward_lora(x, lora_A, lora_B, scaling, dropout_p). nn.Linear holds its [N, K]
as `weight`. GPT-2's Conv1D (transformers) holds the transpose and calls the sizes nx and nf. An nn.Embedding is a
linear layer with one-hot inputs that also holds the transpose. A convolution is a linear layer over patches of its
input, with one weight [N, K] for K = in_channels / groups * kernel size. bitsandbytes' layers hold codes. Only this
file and foreign_layer.py depend on these differences.
"""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...nn.linear_nf4 import LinearNF4, is_conv1d
from ..core.offloaded import weight_of
from .foreign_layer import bitsandbytes_weight, gives_rows, is_bitsandbytes, weight_unreadable
from .overridden_module import plain_class


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of one of the supported kinds."""
    return isinstance(module, LinearNF4) or is_conv1d(module) or (isinstance(module, nn.Linear) and gives_rows(module))


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module is an nn.Embedding, or transformers' embedding with scaled output (Gemma, BART).

    Other subclasses may compute something else.
    """
    kind = plain_class(module)
    return kind is nn.Embedding or (issubclass(kind, nn.Embedding) and _is_scaled(kind))


_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convolution_class(module: nn.Module) -> Any:
    """Return nn.Conv1d, nn.Conv2d or nn.Conv3d if the module computes that, otherwise None.

    Subclasses with a forward of their own, such as those that pad their input by themselves, are left out.
    """
    kind: Any = plain_class(module)
    for convolution in _CONVOLUTIONS:
        if issubclass(kind, convolution):
            own = kind.forward is convolution.forward and kind._conv_forward is convolution._conv_forward
            return convolution if own else None
    return None


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is an nn.Conv1d, nn.Conv2d or nn.Conv3d."""
    return convolution_class(module) is not None


def _is_scaled(kind: type[nn.Module]) -> bool:
    return kind.__name__.endswith("ScaledWordEmbedding") and kind.__module__.startswith("transformers.models.")


def embedding_scale(base: nn.Module) -> Tensor | float:
    """Return the factor between a row of an embedding's table and its output; 1.0 for nn.Embedding."""
    return base.embed_scale if _is_scaled(plain_class(base)) else 1.0  # type: ignore[return-value]


def stores_transposed(base: nn.Module) -> bool:
    """Whether `base.weight` is the transpose of W [N, K]."""
    return isinstance(base, nn.Embedding) or is_conv1d(base)


def is_quantized(module: nn.Module) -> bool:
    """Return whether a layer stores its weight as codes, as LinearNF4 and bitsandbytes' layers do."""
    return _can_dequantize(module) or is_bitsandbytes(module)


def _can_dequantize(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and callable(getattr(module, "dequantize", None))


def features(base: nn.Module) -> tuple[int, int]:
    """Return (in_features K, out_features N) of a base layer; K is the size of a patch for a convolution."""
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    if is_convolution(base):
        conv = cast(nn.Conv2d, base)
        return conv.in_channels // conv.groups * math.prod(conv.kernel_size), conv.out_channels
    return (base.nx, base.nf) if is_conv1d(base) else (base.in_features, base.out_features)  # type: ignore[return-value]


def dense_weight(base: nn.Module) -> Tensor:
    """Return the weight [N, K] as the forward uses it, fp32 and detached.

    Raises NotImplementedError for a layer of another library whose stored weight cannot be read.
    """
    if _can_dequantize(base):
        weight: Tensor = base.dequantize(torch.float32)  # type: ignore[operator]
    elif is_bitsandbytes(base):
        weight = bitsandbytes_weight(base)  # type: ignore[arg-type]
    elif isinstance(base, nn.Linear):
        if reason := weight_unreadable(base):
            raise NotImplementedError(
                f"base layer: must be an nn.Linear, LinearNF4, Conv1D or a bitsandbytes layer where its weight is read "
                f"(merging, DoRA, PiSSA), got {type(base).__name__}: {reason}"
            )
        weight = weight_of(base, "weight")
    elif is_convolution(base):
        weight = weight_of(base, "weight").flatten(1)
    else:
        weight = weight_of(base, "weight").T
    return weight.detach().float()


def weight_dtype(base: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype of the weight, for quantized weights that before quantization, or `default` if it is unknown."""
    own = getattr(base, "weight_dtype", None)
    return own or (default if is_quantized(base) else base.weight.dtype)  # type: ignore[return-value]


def device_of(base: nn.Module) -> torch.device:
    """Return the device of the module's first parameter or buffer."""
    return next(t for t in (*base.parameters(), *base.buffers())).device


def with_weight(
    base: nn.Module, weight: Tensor, bias: Tensor | None, target: str, *, default: torch.dtype = torch.float32
) -> nn.Module:
    """Return a new layer y = x weight^T + bias in the storage `target`; `base` is not changed.

    weight: fp32 [N, K].
    target: "16bit" = dense, in weight_dtype(base, default); "nf4" = LinearNF4;  "same" = as the base, which must not be
    a layer of another library. Embeddings and convolutions stay dense.
    Raises ValueError for another target, and NotImplementedError for "same" over a layer of bitsandbytes.
    """
    if target not in ("16bit", "nf4", "same"):
        raise ValueError(f"merge: target must be '16bit', 'nf4' or 'same', got {target!r}")
    if target == "same" and is_bitsandbytes(base):
        raise NotImplementedError(f"merge: target must be '16bit' or 'nf4' over a {type(base).__name__}, got 'same'")
    n, k = weight.shape
    dtype = weight_dtype(base, default)
    layer: nn.Module
    if isinstance(base, nn.Embedding):
        # The copy has the padding index, the scale and other options.
        layer = copy.copy(base)
        layer._parameters = {"weight": nn.Parameter(weight.T.contiguous().to(dtype), requires_grad=False)}
        layer._buffers, layer._modules = dict(base._buffers), {}
        layer.__class__ = plain_class(base)  # type: ignore[assignment]
        return layer
    if is_convolution(base):
        return _convolution_with(cast(nn.Conv2d, base), weight.to(dtype), bias)
    dense_class = getattr(base, "dense_class", plain_class(base))
    if is_conv1d(dense_class):
        layer = dense_class(n, k)
        layer.weight = nn.Parameter(weight.T.contiguous().to(dtype), requires_grad=False)
    else:
        layer = nn.Linear(k, n, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    if target == "nf4" or (target == "same" and is_quantized(base)):
        layer = quantized(layer, like=base)
    return layer.train(base.training)


def _convolution_with(base: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Module:
    conv: nn.Conv2d = convolution_class(base)(
        base.in_channels,
        base.out_channels,
        base.kernel_size,
        base.stride,
        base.padding,
        base.dilation,
        base.groups,
        bias=bias is not None,
        padding_mode=base.padding_mode,
        device="meta",
    )
    conv.weight = nn.Parameter(weight.reshape(base.weight.shape), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    return conv.train(base.training)


def quantized(linear: nn.Module, *, like: nn.Module | None = None) -> nn.Module:
    """Return `linear` as LinearNF4, with the blocksize, compute dtype and storage of `like` if that is a LinearNF4."""
    if isinstance(like, LinearNF4):
        layer = LinearNF4.from_linear(
            linear, blocksize=like.blocksize, double_quant=like.double_quant, compute_dtype=like.compute_dtype
        )
        layer.store_as(like)
        return layer
    return LinearNF4.from_linear(linear)
