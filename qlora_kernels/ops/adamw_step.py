"""adamw_step: one AdamW step over many parameters whose states are stored in one arena of bytes.

Op: qlora_kernels::adamw_step, in place on params and arena.

With g = grad * grad_multiplier in fp32. Each operation, including the root, is rounded once to fp32; `fma` is one
operation. On CPUs with fused multiply-adds, this order makes fp32 parameters bit-equal to
torch.optim.AdamW(fused=True), except for the last numel % 16 elements, which torch contracts differently. Torch's
default and foreach paths take the root from MKL, which is sometimes off by an ulp. On other CPUs torch also rounds the
products:

    p   = p * (1 - lr * weight_decay)                                where weight_decay != 0
    m   = fma(1 - beta1, g - m, m)                                   where beta1 > 0.5
    m   = fma((1 - beta1) - 1, g - m, g)                             elsewhere
    v   = fma((1 - beta2) * g, g, v * beta2)
    p   = p + (-lr / (1 - beta1**t) * m) / (sqrt(v) / sqrt(1 - beta2**t) + eps)

Scalars are computed in double from the Python floats and rounded once. 16-bit parameters are read exactly, updated in
fp32 and rounded once at the end: to nearest even, or stochastically for bf16 with a `seed`. Stochastic rounding adds 16
random bits, draw(COUNTER + i - START) of ops/philox, below the bf16 mantissa and truncates, so that the probability of
rounding up is the fraction that truncation loses. 8-bit states (format/blockwise8.py) are decoded to fp32, updated,
used, and then encoded again. They cannot represent NaN: if m or v is not finite, both are encoded as zero, so that one
bad gradient affects one parameter and not its whole block.

Kernel contract:
    run(step: Step) -> None
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..format.blockwise8 import STATE_BLOCKSIZE as STATE_BLOCKSIZE
from ..format.blockwise8 import dequantize_blockwise as dequantize_blockwise
from ..format.blockwise8 import quantize_blockwise as quantize_blockwise
from ._implement import fake, implement
from .checks import check_float
from .registry import Problem, select
from .tensor_memory import check_memory


class Segment(NamedTuple):
    """A range of one parameter's elements and the offsets of its states; one row of the kernel's `segments`."""

    param: int
    """Index into params, grads and steps."""
    start: int
    """First element of the range; a multiple of STATE_BLOCKSIZE."""
    numel: int
    """Number of elements; a multiple of STATE_BLOCKSIZE unless the range ends the parameter."""
    exp_avg: int
    """Byte offset in the arena of exp_avg's element `start`: fp32, or uint8 if the absmax offsets are given."""
    exp_avg_sq: int
    exp_avg_absmax: int
    """Byte offset in the arena of the fp32 absmax of the block at `start`; -1 for fp32 states."""
    exp_avg_sq_absmax: int
    counter: int
    """Index of element `start` in the random sequence of stochastic rounding; a multiple of STATE_BLOCKSIZE."""


SEGMENT_COLUMNS = Segment._fields


class Step(NamedTuple):
    """The operands of one step.

    params: fp32, bf16 or fp16, each a dense block of memory that is processed as a flat array.   grads: one per param,
    of its dtype and memory layout; the segments of a param with grad None are skipped.
    arena: uint8 [nbytes], contiguous, 64-byte aligned.   steps: fp32 [n_params], t of each param, at least 1.
    segments: int64 [n_segments, 8], on steps' device; each row gives the elements to update and the offsets of their
    states, in the columns of SEGMENT_COLUMNS. Rows never overlap.
    lr: one element, any float dtype, on the CPU or on the params' device.   seed: int64 [1] or None.
    grad_multiplier: fp32 [1] or None (1).   found_inf: fp32 [1] or None; nothing is written if it is not zero. On CUDA,
    only the kernel reads these and an lr on the device: no host synchronization, safe under graph capture.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    arena: Tensor
    steps: Tensor
    segments: Tensor
    lr: Tensor
    seed: Tensor | None
    grad_multiplier: Tensor | None
    found_inf: Tensor | None
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


torch.library.define(
    "qlora_kernels::adamw_step",
    "(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!) arena, Tensor steps, Tensor segments, Tensor lr, Tensor? seed, "
    "Tensor? grad_multiplier, Tensor? found_inf, float beta1, float beta2, float eps, float weight_decay) -> ()",
)


@implement("qlora_kernels::adamw_step", (Step,))
def adamw_step(step: Step) -> None:
    """Check the arguments, then run the step defined in this module's docstring by the selected kernel; in place."""
    adamw_step_fake(step)
    check_memory("adamw_step", (step.lr, step.seed, step.grad_multiplier, step.found_inf, step.steps))
    run_adamw_step(step)


def run_adamw_step(step: Step) -> None:
    """Run adamw_step without checks, for PagedAdamW, which has checked its arguments.

    The dispatcher and the checks visit each of hundreds of tensors, which takes longer than the step of small ones.
    """
    if not step.params:
        return
    select(Problem("adamw_step", step.params[0].device.type, step.params[0].dtype)).run(step)


@fake("qlora_kernels::adamw_step", (Step,))
def adamw_step_fake(step: Step) -> None:
    """Check the arguments, except the contents of segments, which may be in device memory.

    Raises ValueError or TypeError, naming the argument, for lengths, dtypes, shapes or strides that do not fit
    together.
    """
    params, grads, arena, segments = step.params, step.grads, step.arena, step.segments
    if len(grads) != len(params) or step.steps.numel() != len(params):
        counts = f"{len(params)} params, {len(grads)} grads and {step.steps.numel()} steps"
        raise ValueError(f"adamw_step: grads and steps must be one for each param, got {counts}")
    for param, grad in zip(params, grads, strict=True):
        if grad is not None:
            check_float("adamw_step", "params", param)
            if grad.dtype != param.dtype:
                raise TypeError(f"adamw_step: grads must have their param's {param.dtype}, got {grad.dtype}")
            if grad.shape != param.shape or grad.stride() != param.stride():
                got = f"{tuple(grad.shape)} with strides {grad.stride()}"
                expected = f"{tuple(param.shape)} with strides {param.stride()}"
                raise ValueError(f"adamw_step: grads must be laid out as their param, {expected}, got {got}")
    if arena.dtype != torch.uint8 or not arena.is_contiguous():
        raise TypeError(f"adamw_step: arena must be contiguous uint8, got {arena.dtype}, strides {arena.stride()}")
    if segments.dtype != torch.int64 or segments.dim() != 2 or segments.shape[1] != len(SEGMENT_COLUMNS):
        got = f"{segments.dtype} {tuple(segments.shape)}"
        raise ValueError(f"adamw_step: segments must be int64 [n, {len(SEGMENT_COLUMNS)}], got {got}")
    for name in ("lr", "seed", "grad_multiplier", "found_inf"):
        scalar: Tensor | None = getattr(step, name)
        if scalar is not None and scalar.numel() != 1:
            raise ValueError(f"adamw_step: {name} must have one element, got shape {tuple(scalar.shape)}")
