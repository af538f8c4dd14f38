"""AdamW by csrc/cuda/adamw_step.cu: one launch, no host synchronization, safe under graph capture."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...format.quant_state import DTYPE_CODES
from ...ops.adamw_step import Step


def adamw_step(step: Step) -> None:
    """The contract of ops/adamw_step.py in one launch."""
    rows: list[int] = []
    for param, grad in zip(step.params, step.grads, strict=True):
        rows += (param.data_ptr(), 0 if grad is None else grad.data_ptr(), DTYPE_CODES[param.dtype], param.numel())
    on_device = step.lr.device == step.arena.device
    skipped = torch.empty(0, device=step.arena.device)  # the library skips a parameter whose gradient is empty
    torch.ops.qlora_kernels_C.cuda_adamw_step(
        step.params,
        [skipped if grad is None else grad for grad in step.grads],
        _on_device(tuple(rows), step.arena.device),
        step.segments,
        step.steps,
        step.arena,
        step.lr if on_device else None,
        0.0 if on_device else float(step.lr),
        step.seed,
        step.grad_multiplier,
        step.found_inf,
        step.beta1,
        step.beta2,
        step.eps,
        step.weight_decay,
    )


@lru_cache(maxsize=64)
def _on_device(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """The table of addresses in device memory. Gradients that stay in place need it sent once, so that a captured
    graph finds it there; the pinned copy is kept by torch's allocator until the transfer is over.
    """
    table = torch.tensor(rows, dtype=torch.int64)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)
