"""AdamW in the native library: one call for all tensors of a step."""

from __future__ import annotations

import torch

from ...ops.adamw_step import Step


def adamw_step(step: Step) -> None:
    """Run the step of ops/adamw_step.py in one native call."""
    if step.found_inf is not None and step.found_inf.item() != 0:
        return
    skipped = torch.empty(0, device="cpu")  # the library skips a parameter whose gradient is empty
    torch.ops.qlora_kernels_C.cpu_adamw_step(
        step.params,
        [skipped if grad is None else grad for grad in step.grads],
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
