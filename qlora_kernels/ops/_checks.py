"""Checks of op arguments, shared by eager calls and fakes: `<op>: <argument> must <rule>, got <value>`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format import nf4
from ..format.double_quant import NESTED_BLOCKSIZE
from ..format.quant_state import FLOAT_DTYPES, n_blocks


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """Weights and activations are fp32, bf16 or fp16."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check_blocksize(op: str, blocksize: int) -> None:
    """Blocksize is one of the format's."""
    if blocksize not in nf4.BLOCKSIZES:
        raise ValueError(f"{op}: blocksize must be one of {nf4.BLOCKSIZES}, got {blocksize}")


def check_last_dim(op: str, name: str, tensor: Tensor, expected: int, symbol: str) -> None:
    """The contracted dimension fits the weight."""
    if tensor.dim() < 1 or tensor.shape[-1] != expected:
        got = tuple(tensor.shape)
        raise ValueError(f"{op}: {name}.shape[-1] must equal {symbol}={expected}, got shape {got}")


def check_weight(
    op: str,
    packed: Tensor,
    absmax: Tensor | None,
    absmax_q: Tensor | None,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    *,
    blocksize: int,
    numel: int,
    device: torch.device,
) -> None:
    """Packed bytes and constants belong to one weight of `numel` elements on `device`."""
    check_blocksize(op, blocksize)
    blocks = n_blocks(numel, blocksize)
    _check_tensor(op, "packed", packed, torch.uint8, (numel + 1) // 2, device)
    if absmax is not None:
        if not (absmax_q is None and absmax_scale is None and absmax_offset is None):
            raise ValueError(f"{op}: absmax excludes absmax_q, absmax_scale and absmax_offset, got both")
        _check_tensor(op, "absmax", absmax, torch.float32, blocks, device)
        return
    if absmax_q is None or absmax_scale is None or absmax_offset is None:
        raise ValueError(f"{op}: either absmax or all of absmax_q, absmax_scale and absmax_offset must be given")
    _check_tensor(op, "absmax_q", absmax_q, torch.uint8, blocks, device)
    _check_tensor(op, "absmax_scale", absmax_scale, torch.float32, n_blocks(blocks, NESTED_BLOCKSIZE), device)
    _check_tensor(op, "absmax_offset", absmax_offset, torch.float32, 1, device)


def check_bias(op: str, bias: Tensor | None, out_features: int, device: torch.device) -> None:
    """Bias is a float vector of length N."""
    if bias is None:
        return
    check_float(op, "bias", bias)
    _check_tensor(op, "bias", bias, bias.dtype, out_features, device)


def check_lora(
    op: str, lora_A: Tensor, lora_B: Tensor, *, in_features: int, out_features: int, device: torch.device
) -> None:
    """lora_A [r, K] and lora_B [N, r] share a rank of at least one."""
    check_float(op, "lora_A", lora_A)
    check_float(op, "lora_B", lora_B)
    if lora_A.dim() != 2 or lora_A.shape[1] != in_features or lora_A.shape[0] < 1:
        raise ValueError(f"{op}: lora_A must have shape [r, K={in_features}], got {tuple(lora_A.shape)}")
    if lora_B.dim() != 2 or lora_B.shape[0] != out_features or lora_B.shape[1] != lora_A.shape[0]:
        expected = f"[N={out_features}, r={lora_A.shape[0]}]"
        raise ValueError(f"{op}: lora_B must have shape {expected}, got {tuple(lora_B.shape)}")
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_dropout(op: str, dropout_p: float, seed: Tensor | None) -> None:
    """0 <= dropout_p < 1, and a seed where it is positive."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must lie in [0, 1), got {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError(f"{op}: seed must be given when dropout_p > 0, got None; pass an int64 tensor of one element")


def _check_tensor(op: str, name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.numel() != numel:
        raise ValueError(f"{op}: {name} must have {numel} elements, got {tensor.numel()}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")
