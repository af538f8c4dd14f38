"""The base-layer protocol: all that a method may know of a linear layer, whatever its storage.

A base layer has in_features, out_features, bias and forward; a quantized one also dequantize(dtype) -> [N, K]; one
with a fused low-rank path also forward_lora(x, lora_A, lora_B, scaling, dropout_p). nn.Linear holds its [N, K] as
`weight`; GPT-2's Conv1D (transformers) holds the transpose and calls the sizes nx, nf; an nn.Embedding is a linear
layer of one-hot tokens that holds the transpose too. Only this file knows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.linear_nf4 import LinearNF4, is_conv1d


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, LinearNF4)) or is_conv1d(module)


def is_embedding(module: nn.Module) -> bool:
    """Whether it is nn.Embedding itself: a subclass may compute something else."""
    return type(module) is nn.Embedding


def is_quantized(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and callable(getattr(module, "dequantize", None))


def features(base: nn.Module) -> tuple[int, int]:
    """(in_features K, out_features N)."""
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    return (base.nx, base.nf) if is_conv1d(base) else (base.in_features, base.out_features)  # type: ignore[return-value]


def dense_weight(base: nn.Module) -> Tensor:
    """[N, K] fp32, detached: the weight as the forward uses it."""
    if is_quantized(base):
        weight: Tensor = base.dequantize(torch.float32)  # type: ignore[operator]
    else:
        weight = base.weight.T if is_conv1d(base) or is_embedding(base) else base.weight  # type: ignore[union-attr, assignment]
    return weight.detach().float()


def device_of(base: nn.Module) -> torch.device:
    return next(t for t in (*base.parameters(), *base.buffers())).device


def with_weight(base: nn.Module, weight: Tensor, bias: Tensor | None, target: str) -> nn.Module:
    """A new layer y = x weight^T + bias in the storage `target`; `base` is not touched.

    weight: fp32 [N, K].   target: "16bit" = dense, in the dtype the base's weights have or were quantized from;
    "nf4" = LinearNF4;  "same" = as the base is. An embedding stays dense.
    """
    if target not in ("16bit", "nf4", "same"):
        raise ValueError(f"merge: target must be '16bit', 'nf4' or 'same', got {target!r}")
    n, k = weight.shape
    dtype: torch.dtype = base.weight_dtype if is_quantized(base) else base.weight.dtype  # type: ignore[assignment, union-attr]
    if isinstance(base, nn.Embedding):
        options = {name: getattr(base, name) for name in ("max_norm", "norm_type", "scale_grad_by_freq", "sparse")}
        table = weight.T.contiguous().to(dtype)
        return nn.Embedding(k, n, base.padding_idx, **options, _weight=table, _freeze=True).train(base.training)
    if is_conv1d(base) and target != "nf4":
        layer: nn.Module = type(base)(n, k)
        layer.weight = nn.Parameter(weight.T.contiguous().to(dtype), requires_grad=False)
    else:
        layer = nn.Linear(k, n, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    if target == "nf4" or (target == "same" and is_quantized(base)):
        layer = quantized(layer, like=base)
    return layer.train(base.training)


def quantized(linear: nn.Module, *, like: nn.Module | None = None) -> nn.Module:
    """`linear` as LinearNF4, with the block size and compute dtype of `like` where that is one."""
    if isinstance(like, LinearNF4):
        return LinearNF4.from_linear(
            linear,
            blocksize=like.blocksize,
            double_quant=like.quant_state.absmax_q is not None,
            compute_dtype=like.compute_dtype,
        )
    return LinearNF4.from_linear(linear)
