"""Attention and its gradients in float64, with bounds on the error of any correct computation of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cross_entropy_formula import EXP, RISE, TANH, U
from .tolerances import Expected, exactly, gamma, product, unit_roundoff


@dataclass(frozen=True)
class Attention:
    """out [B, H, Tq, D] and the gradients of q, k and v."""

    out: Expected
    grad_q: Expected
    grad_k: Expected
    grad_v: Expected


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Attention:
    """visible: bool [B, Tq, Tk], True for keys that a query attends to.

    Probabilities and gradients of scores may be rounded to q's dtype before they are multiplied; sums are fp32. The
    error of a probability is that of cross_entropy_formula.py. The backward pass multiplies it by dP - delta, where
    delta = rowsum(grad_out * out) has the error of out, rounded when it is stored.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    B, H, KV = q.shape[0], q.shape[1], k.shape[1]
    rows: list[Expected] = []
    grads_q: list[Expected] = []
    grads_k: list[Expected] = []
    grads_v: list[Expected] = []
    for b in range(B):
        for kv in range(KV):
            heads = range(kv * H // KV, (kv + 1) * H // KV)
            each = [
                _head(q[b, h], k[b, kv], v[b, kv], grad_out[b, h], visible[b], scale, softcap, q.dtype) for h in heads
            ]
            rows += [head.out for head in each]
            grads_q += [product(head.grad_z, exactly(k[b, kv])).scaled(scale).to(q.dtype) for head in each]
            stacked_q = exactly(torch.cat([q[b, h] for h in heads]))
            stacked_grad = exactly(torch.cat([grad_out[b, h] for h in heads]))
            grad_z, p = _cat([head.grad_z for head in each]), _cat([head.p for head in each])
            grads_k.append(product(grad_z.T, stacked_q).scaled(scale).to(q.dtype))
            grads_v.append(product(p.T, stacked_grad).to(q.dtype))
    return Attention(_stack(rows, B), _stack(grads_q, B), _stack(grads_k, B), _stack(grads_v, B))


@dataclass(frozen=True)
class _Head:
    out: Expected
    p: Expected
    grad_z: Expected


def _head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> _Head:
    z = product(exactly(q), exactly(k).T).scaled(scale)
    z = Expected(z.value, z.error + 4 * U * z.magnitude)  # log2(e) may be a factor of the scale
    slope = Expected(torch.ones_like(z.value), torch.zeros_like(z.value))
    if softcap:
        t = torch.tanh(z.value / softcap)
        error = z.error + 4 * U * z.magnitude + softcap * (TANH + 4 * U)
        z, slope = Expected(softcap * t, error), Expected(1 - t * t, 2 * error / softcap + 8 * U)
    sees = visible.any(1, keepdim=True)
    hidden = -float("inf")
    log_sums = torch.where(sees, z.value.masked_fill(~visible, hidden).logsumexp(1, keepdim=True), 0.0)
    highest = torch.where(sees, z.value.masked_fill(~visible, hidden).amax(1, keepdim=True), 0.0)
    p = torch.exp(z.value - log_sums) * visible
    span = ((z.value - highest).abs() + RISE) * visible
    of_exp = (z.error + (EXP + 3 * span + 2) * U) * visible
    of_sum = (p * of_exp).sum(1, keepdim=True) + gamma(p.shape[1], torch.float32) + p.shape[1] * 2.0**-126
    of_log_sum = of_sum + 8 * U * (log_sums.abs() + highest.abs() + RISE + 4)
    rounded = 0.0 if dtype == torch.float32 else unit_roundoff(dtype)
    tiny = 2.0**-120 if dtype != torch.float16 else 2.0**-24
    error = p * (of_exp + of_sum + of_log_sum + 12 * U)
    kept = Expected(p, (error + tiny) * visible)
    multiplied = Expected(p, (error + rounded * p + tiny) * visible)
    out = product(multiplied, exactly(v))
    out = Expected(out.value, out.error + 4 * U * out.magnitude).to(dtype)
    grad_p = product(exactly(grad), exactly(v).T)
    delta = product(_times(out, grad), exactly(torch.ones(grad.shape[1], 1)))
    difference = grad_p + Expected(-delta.value, delta.error)
    grad_z = _multiply(_multiply(kept, difference), slope)
    grad_z = Expected(grad_z.value, (grad_z.error + rounded * grad_z.magnitude + tiny) * visible)
    return _Head(out, multiplied, grad_z)


def _times(a: Expected, factor: Tensor) -> Expected:
    return _multiply(a, exactly(factor))


def _multiply(a: Expected, b: Expected) -> Expected:
    error = a.error * b.magnitude + a.value.abs() * b.error
    return Expected(a.value * b.value, error + 2 * U * a.magnitude * b.magnitude)


def _cat(parts: list[Expected]) -> Expected:
    return Expected(torch.cat([part.value for part in parts]), torch.cat([part.error for part in parts]))


def _stack(parts: list[Expected], B: int) -> Expected:
    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).unflatten(0, (B, -1))

    return Expected(stacked([part.value for part in parts]), stacked([part.error for part in parts]))
