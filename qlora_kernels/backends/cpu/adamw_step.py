"""AdamW over raw pointers: the lists of tensors cross into the library as one table."""

from __future__ import annotations

from array import array

import torch

from ...ops.adamw_step import Step

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of csrc/bindings/cpu_adamw_step.cpp."""


def adamw_step(step: Step) -> None:
    """The contract of ops/adamw_step.py in one native call."""
    if step.found_inf is not None and step.found_inf.item() != 0:
        return
    rows: list[int] = []
    for param, grad in zip(step.params, step.grads, strict=True):
        rows += (param.data_ptr(), 0 if grad is None else grad.data_ptr(), param.numel(), _DTYPES[param.dtype])
    torch.ops.qlora_kernels_C.cpu_adamw_step(
        torch.frombuffer(array("q", rows), dtype=torch.int64),
        step.steps,
        step.segments,
        step.arena,
        step.seed,
        float(step.lr),
        step.beta1,
        step.beta2,
        step.eps,
        step.weight_decay,
        1.0 if step.grad_multiplier is None else float(step.grad_multiplier),
    )
