"""The requirements of PagedAdamW for its parameters and parameter groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from .shards import is_dtensor, local

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "maximize")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for hyperparameters out of range and for flags of torch's AdamW that are not offered."""

    def refuse(name: str, rule: str) -> NoReturn:
        raise ValueError(f"PagedAdamW: {name} must {rule}, got {group[name]}")

    if isinstance(group["lr"], Tensor):
        if group["lr"].numel() != 1:
            refuse("lr", "be a number or a tensor of one element")
    elif not 0.0 <= group["lr"] < math.inf:
        refuse("lr", "be finite and >= 0")
    if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        refuse("betas", "be two numbers in [0, 1)")
    for name in ("eps", "weight_decay"):
        if not 0.0 <= group[name] < math.inf:
            refuse(name, "be finite and >= 0")
    check_flags(group)


def check_flags(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a group selects a variant that PagedAdamW does not compute.

    `foreach` and `fused` select implementations of the same step and are ignored. A step on CUDA is always capturable,
    a step on the CPU never.
    """
    for flag in ("amsgrad", "differentiable"):
        if group.get(flag):
            raise ValueError(f"PagedAdamW: {flag} must be false, got {group[flag]}; use torch.optim.AdamW")
    if group.get("decoupled_weight_decay") is False:
        raise ValueError("PagedAdamW: decoupled_weight_decay must be true, got False; use torch.optim.Adam")
    if group.get("capturable") and any(param.device.type != "cuda" for param in group["params"]):
        raise ValueError("PagedAdamW: capturable must be false for parameters that are not on CUDA, got True")


def check_param(param: Tensor) -> None:
    """Raise TypeError or ValueError unless `param` is a dense float tensor, or a DTensor whose local part is one."""
    if is_dtensor(param):
        if any(placement.is_partial() for placement in param.placements):
            raise TypeError(f"PagedAdamW: a DTensor parameter must be sharded or replicated, got {param.placements}")
        check_param(local(param))
        return
    if torch._C._dispatch_keys(param).has(torch._C.DispatchKey.Python):
        raise TypeError(
            f"PagedAdamW: parameters must be plain tensors or DTensors, got {type(param.data).__name__}, whose memory "
            "is not its own; use torch.optim.AdamW"
        )
    if param.layout is not torch.strided:
        raise TypeError(f"PagedAdamW: parameters must be dense, got {param.layout}")
    if param.dtype not in DTYPES:
        raise TypeError(f"PagedAdamW: parameters must be float32, bfloat16 or float16, got {param.dtype}")
    if param.is_meta:
        raise ValueError("PagedAdamW: parameters must have memory, got one on the meta device; materialize it first")
    strides = sorted((stride, size) for stride, size in zip(param.stride(), param.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in strides:
        if stride != expected:
            got = f"shape {tuple(param.shape)} with strides {param.stride()}"
            raise ValueError(f"PagedAdamW: parameters must fill a block of memory, got {got}; use .contiguous()")
        expected *= size
