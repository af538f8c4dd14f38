"""AdamW over raw pointers: the lists of tensors cross into the library as one table."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of csrc/bindings/cpu_adamw_step.cpp."""


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    arena: Tensor,
    steps: Tensor,
    segments: Tensor,
    lr: Tensor,
    seed: Tensor | None,
    grad_multiplier: Tensor | None,
    found_inf: Tensor | None,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The contract of ops/adamw_step.py in one native call."""
    if found_inf is not None and found_inf.item() != 0:
        return
    rows: list[int] = []
    for param, grad in zip(params, grads, strict=True):
        rows += (param.data_ptr(), 0 if grad is None else grad.data_ptr(), param.numel(), _DTYPES[param.dtype])
    torch.ops.qlora_kernels_C.cpu_adamw_step(
        torch.frombuffer(array("q", rows), dtype=torch.int64),
        steps,
        segments,
        arena,
        seed,
        float(lr),
        beta1,
        beta2,
        eps,
        weight_decay,
        1.0 if grad_multiplier is None else float(grad_multiplier),
    )
