"""Helpers of the linear ops: flattening of x, the Problem of a call, and results that need no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import GroupLoRA, LoRA, MultiLoRA, Weight
from .registry import Problem, device_type
from .tensor_memory import check_memory

CONSTANTS = ("absmax", "absmax_scale", "absmax_offset")
"""The float arguments that describe W, for which no gradient exists."""


def flatten_to_2d(rows: Tensor) -> Tensor:
    """Return [..., C] as a contiguous [M, C]."""
    if not rows.is_contiguous():
        check_memory("qlora_kernels", rows)
    elif rows.dim() == 2:
        return rows
    elif rows.numel():
        return rows.view(-1, rows.shape[-1])  # one call, which takes a microsecond
    return rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]).contiguous()


def restore_leading_dims(result: Tensor, rows: Tensor) -> Tensor:
    """Return a kernel's [M, C] with the leading dimensions of rows.

    For autograd, the result is not a view: models write into the output of a linear layer (`y += residual`, `relu_`),
    and a view that a torch.autograd.Function returns must not be written to.
    """
    return result if rows.dim() == 2 else result.view(*rows.shape[:-1], result.shape[1]).data


def problem_of(op: str, rows: Tensor, weight: Weight, lora: LoRA | MultiLoRA | GroupLoRA | None = None) -> Problem:
    """Return the Problem of a call of `op`. rows: x [..., K] or grad_y [..., N]."""
    shape = rows.shape
    fields = (
        op,
        device_type(rows),
        rows.dtype,
        shape[0] if len(shape) == 2 else shape[:-1].numel(),
        weight.N,
        weight.K,
        0 if lora is None else lora.r,
        weight.blocksize,
        weight.absmax is None,
        lora is not None and lora.dropout_p > 0,
    )
    return tuple.__new__(Problem, fields)  # takes a third of the time of Problem(*fields), once for each call of an op


def is_empty(rows: Tensor, weight: Weight) -> bool:
    """Whether the product has no terms or no elements, so that no kernel is needed."""
    return rows.numel() == 0 or weight.N == 0 or weight.K == 0


def bias_only_output(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return y [..., N] for an empty product: the bias, or zeros, in each row."""
    check_memory("qlora_kernels", bias)
    zeros = x.new_zeros((*x.shape[:-1], weight.N))
    return zeros if bias is None else zeros + bias.to(x.dtype)


def sum_over_rows(grad_y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a bias: grad_y [..., N] summed over its leading dimensions, [N] of `dtype`."""
    return grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=dtype)
