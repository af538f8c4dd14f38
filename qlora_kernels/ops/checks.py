"""Checks of op arguments, shared by eager calls and fakes: `<op>: <argument> must <rule>, got <value>`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import nf4
from ..format.double_quant import NESTED_BLOCKSIZE
from ..format.quant_state import FLOAT_DTYPES, n_blocks
from .operands import LoRA, MultiLoRA, Weight


def check_given(op: str, name: str, tensor: Tensor | None) -> None:
    """Raise TypeError for None, which torch accepts where a schema requires a tensor."""
    if tensor is None:
        raise TypeError(f"{op}: {name} must be a tensor, got None")


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor is fp32, bf16 or fp16."""
    if tensor is None:
        check_given(op, name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check_like(op: str, name: str, tensor: Tensor, of: str, other: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """Raise unless `tensor` has the shape and device of `other`, called `of` in the message, and its dtype or
    `dtype`.
    """
    if tensor is None:
        check_given(op, name, tensor)
    if tensor.shape != other.shape:
        raise ValueError(f"{op}: {name} must have the shape of {of}, {tuple(other.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != (dtype or other.dtype):
        raise TypeError(f"{op}: {name} must have dtype {dtype or other.dtype} beside {of}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other.device}, got {tensor.device}")


def check_blocksize(op: str, blocksize: int) -> None:
    """Raise TypeError unless the blocksize is an integer, and ValueError unless the format has it."""
    if not hasattr(type(blocksize), "__index__"):
        raise TypeError(f"{op}: blocksize must be an int, got {blocksize!r}")
    if blocksize not in nf4.BLOCKSIZES:
        raise ValueError(f"{op}: blocksize must be one of {nf4.BLOCKSIZES}, got {blocksize}")


def check_last_dim(op: str, name: str, tensor: Tensor, expected: int, symbol: str) -> None:
    """Raise ValueError unless the contraction dimension equals the weight's."""
    if tensor.dim() < 1 or tensor.shape[-1] != expected:
        got = tuple(tensor.shape)
        raise ValueError(f"{op}: {name}.shape[-1] must equal {symbol}={expected}, got shape {got}")


def check_weight(op: str, weight: Weight, device: torch.device) -> None:
    """Raise unless packed bytes and constants describe one weight of N * K elements on `device`."""
    packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K = weight
    check_blocksize(op, blocksize)
    numel = N * K
    blocks = n_blocks(numel, blocksize)
    _check_tensor(op, "packed", packed, torch.uint8, (numel + 1) // 2, device)
    if absmax is not None:
        if absmax_q is not None or absmax_scale is not None or absmax_offset is not None:
            raise ValueError(f"{op}: absmax excludes absmax_q, absmax_scale and absmax_offset, got both")
        _check_tensor(op, "absmax", absmax, torch.float32, blocks, device)
        return
    if absmax_q is None or absmax_scale is None or absmax_offset is None:
        raise ValueError(f"{op}: either absmax or all of absmax_q, absmax_scale and absmax_offset must be given")
    _check_tensor(op, "absmax_q", absmax_q, torch.uint8, blocks, device)
    _check_tensor(op, "absmax_scale", absmax_scale, torch.float32, n_blocks(blocks, NESTED_BLOCKSIZE), device)
    _check_tensor(op, "absmax_offset", absmax_offset, torch.float32, 1, device)


def check_x(op: str, x: Tensor, weight: Weight) -> None:
    """Raise unless x [..., K] is float and fits the weight, and the weight is consistent."""
    check_float(op, "x", x)
    check_last_dim(op, "x", x, weight.K, "K")
    check_weight(op, weight, x.device)


def check_grad_y(op: str, grad_y: Tensor, weight: Weight, x: Tensor | None = None) -> None:
    """Raise unless grad_y [..., N] is float and fits the weight and, if given, x."""
    check_float(op, "grad_y", grad_y)
    check_last_dim(op, "grad_y", grad_y, weight.N, "N")
    if x is None:
        return
    shape, of_x = grad_y.shape, x.shape
    matrices = len(shape) == len(of_x) == 2  # whose rows are compared without slices, which take half of this check
    if shape[0] != of_x[0] if matrices else shape[:-1] != of_x[:-1]:
        expected, got = tuple(x.shape[:-1]), tuple(grad_y.shape)
        raise ValueError(f"{op}: grad_y must have the leading dimensions of x, {expected}, got shape {got}")
    _check_like_x(op, "grad_y", grad_y, x)


def check_s(op: str, s: Tensor, x: Tensor, r: int) -> None:
    """Raise unless s has the shape [M, r], dtype and device of the s that the forward op returned."""
    check_given(op, "s", s)
    shape = (x.shape[0] if x.dim() == 2 else x.shape[:-1].numel(), r)
    if s.shape != shape:
        raise ValueError(f"{op}: s must have shape [M, r]={shape}, got {tuple(s.shape)}")
    _check_like_x(op, "s", s, x)


def _check_like_x(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, got {tensor.device}")


def check_bias(op: str, bias: Tensor | None, out_features: int, device: torch.device) -> None:
    """Raise unless the bias is None or a float vector of length N."""
    if bias is None:
        return
    check_float(op, "bias", bias)
    _check_tensor(op, "bias", bias, bias.dtype, out_features, device)


def check_lora(op: str, x: Tensor, weight: Weight, lora: LoRA) -> None:
    """Raise unless the adapter fits the weight and has a seed if dropout_p > 0."""
    _check_factors(op, x, weight, lora.A, lora.B, dims=2)
    _check_dropout(op, lora.dropout_p, lora.seed, x.device)


def check_multi_lora(op: str, x: Tensor, weight: Weight, lora: MultiLoRA) -> None:
    """Raise unless the adapters fit the weight and each row of x has an adapter number."""
    _check_factors(op, x, weight, lora.A, lora.B, dims=3)
    check_given(op, "scalings", lora.scalings)
    check_given(op, "adapter", lora.adapter)
    M, E, scalings, adapter = x.shape[:-1].numel(), lora.A.shape[0], lora.scalings, lora.adapter
    if scalings.shape != (E,) or scalings.dtype != torch.float32:
        raise ValueError(f"{op}: scalings must be float32 [E={E}], got {scalings.dtype} {tuple(scalings.shape)}")
    if adapter.shape != (M,) or adapter.dtype != torch.int64:
        raise ValueError(f"{op}: adapter must be int64 [M={M}], got {adapter.dtype} {tuple(adapter.shape)}")
    for name, tensor in (("scalings", scalings), ("adapter", adapter)):
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device}, got {tensor.device}")
    _check_dropout(op, lora.dropout_p, lora.seed, x.device)


def _check_factors(op: str, x: Tensor, weight: Weight, A: Tensor, B: Tensor, *, dims: int) -> None:
    """Raise unless A [r, K] and B [N, r] have one rank r >= 1; with dims = 3 both have E such matrices."""
    check_float(op, "lora_A", A)
    check_float(op, "lora_B", B)
    shape, device = A.shape, x.device
    if len(shape) != dims or shape[-1] != weight.K or shape[-2] < 1:
        expected = f"[{'E, ' * (dims == 3)}r, K={weight.K}]"
        raise ValueError(f"{op}: lora_A must have shape {expected}, got {tuple(shape)}")
    if B.shape != (*shape[:-2], weight.N, shape[-2]):
        expected = f"[{f'E={shape[0]}, ' * (dims == 3)}N={weight.N}, r={shape[-2]}]"
        raise ValueError(f"{op}: lora_B must have shape {expected}, got {tuple(B.shape)}")
    for name, tensor in (("lora_A", A), ("lora_B", B)):
        if tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def _check_dropout(op: str, dropout_p: float, seed: Tensor | None, device: torch.device) -> None:
    """Raise unless 0 <= dropout_p < 1 and a seed is given if it is positive."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must lie in [0, 1), got {dropout_p}")
    if dropout_p >= 1.0 - 2**-17:
        raise ValueError(f"{op}: dropout_p must be below 1 - 2**-17, or all is dropped, got {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError(f"{op}: seed must be given when dropout_p > 0, got None; pass an int64 tensor of one element")
    if dropout_p > 0 and seed is not None:
        _check_tensor(op, "seed", seed, torch.int64, 1, device)


def _check_tensor(op: str, name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    if tensor is None:
        check_given(op, name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.numel() != numel:
        raise ValueError(f"{op}: {name} must have {numel} elements, got {tensor.numel()}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")
