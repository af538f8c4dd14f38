"""AdamW as ops/adamw_step.py defines it, in operations that round in the same way on every device.

On some CPUs torch's lerp, addcmul and addcdiv fuse product and sum, on others they do not. Many of its fp32 square
roots come from MKL, and 17 % of these are off by an ulp. Single operations round once everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...format.blockwise8 import STATE_BLOCKSIZE, dequantize_blockwise, quantize_blockwise
from ...ops.adamw_step import Segment, Step
from ...ops.philox import philox
from ...rounding import cdiv


def adamw_step(step: Step) -> None:
    """Run the step of ops/adamw_step.py, one segment at a time."""
    if step.found_inf is not None and step.found_inf.item() != 0:
        return
    rate, beta1, beta2 = float(step.lr.item()), step.beta1, step.beta2
    for row in step.segments.tolist():
        segment = Segment(*row)
        grad = step.grads[segment.param]
        if grad is None:
            continue
        stop = segment.start + segment.numel
        param = _flat(step.params[segment.param])[segment.start : stop]
        p = param.float()  # a view of the parameter if it is fp32
        g = _flat(grad)[segment.start : stop].float()
        if step.grad_multiplier is not None:
            g = g * step.grad_multiplier
        m, v = _load(step.arena, segment)
        t = float(step.steps[segment.param].item())

        if step.weight_decay != 0:
            p.mul_(1 - rate * step.weight_decay)
        weight = torch.tensor(1 - beta1, dtype=torch.float32, device=g.device)
        m.copy_(fma(weight, g - m, m) if weight < 0.5 else fma(weight - 1, g - m, g))
        v.copy_(fma(g * (1 - beta2), g, v * beta2))
        root = v.double().sqrt_().float()  # the root in double, rounded to fp32, is correctly rounded
        denominator = root.div_((1 - beta2**t) ** 0.5).add_(step.eps)
        p.add_(m * -(rate / (1 - beta1**t)) / denominator)

        _store(step.arena, segment, m, v)
        if param.dtype == torch.bfloat16 and step.seed is not None:
            param.copy_(_stochastic_bf16(p, int(step.seed.item()), segment.counter))
        elif param.dtype != torch.float32:
            param.copy_(p)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c of fp32 tensors, rounded once.

    The product is exact in float64. The sum is rounded to odd in float64, so that rounding it to fp32 gives the
    correctly rounded result (Boldo and Melquiond, Emulation of FMA and Correctly Rounded Sums, IEEE Trans. Comput. 57,
    2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)  # rounding error of the sum, by Knuth's TwoSum
    bits = total.view(torch.int64)
    inexact_and_even = error.isfinite() & (error != 0) & (bits & 1 == 0)
    towards_error = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact_and_even, bits + towards_error, bits).view(torch.float64).float()


def _flat(tensor: Tensor) -> Tensor:
    """Return a flat view of the tensor's elements in memory order."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _load(arena: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """Return exp_avg and exp_avg_sq, fp32 [count], as views of the arena or decoded copies."""
    n = segment.numel
    if segment.exp_avg_absmax < 0:
        m, v = (_view(arena, offset, 4 * n, torch.float32) for offset in (segment.exp_avg, segment.exp_avg_sq))
        return m, v
    (m_q, m_absmax), (v_q, v_absmax) = _quantized(arena, segment)
    return dequantize_blockwise(m_q, m_absmax, signed=True), dequantize_blockwise(v_q, v_absmax, signed=False)


def _store(arena: Tensor, segment: Segment, m: Tensor, v: Tensor) -> None:
    if segment.exp_avg_absmax < 0:
        return  # updated in place
    finite = m.isfinite() & v.isfinite()
    for target, state, signed in zip(_quantized(arena, segment), (m, v), (True, False), strict=True):
        for view, value in zip(target, quantize_blockwise(torch.where(finite, state, 0.0), signed=signed), strict=True):
            view.copy_(value)


def _quantized(arena: Tensor, segment: Segment) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (q, absmax) of exp_avg and of exp_avg_sq, as views of the arena."""

    def pair(q_offset: int, absmax_offset: int) -> tuple[Tensor, Tensor]:
        absmax_bytes = 4 * cdiv(segment.numel, STATE_BLOCKSIZE)
        return (
            _view(arena, q_offset, segment.numel, torch.uint8),
            _view(arena, absmax_offset, absmax_bytes, torch.float32),
        )

    return pair(segment.exp_avg, segment.exp_avg_absmax), pair(segment.exp_avg_sq, segment.exp_avg_sq_absmax)


def _view(arena: Tensor, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    return arena[offset : offset + nbytes].view(dtype)


def _stochastic_bf16(p: Tensor, seed: int, counter: int) -> Tensor:
    """Round fp32 [n] to bf16 [n] by adding 16 random bits to the bits that truncation drops. NaN stays NaN."""
    calls = torch.arange(counter >> 3, (counter + p.numel() + 7) >> 3, dtype=torch.int64, device=p.device)
    words = philox(seed, calls)
    draws = torch.stack([words & 0xFFFF, words >> 16], dim=2).reshape(-1)[: p.numel()]
    bits = p.view(torch.int32) + draws.to(torch.int32)  # only a NaN can wrap around
    truncated = (bits & -0x10000).view(torch.float32).to(torch.bfloat16)
    return torch.where(p.isnan(), torch.nan, truncated)
