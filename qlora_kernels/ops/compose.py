"""The ops and their gradients composed of torch's ops, differentiable to any order, in reverse and forward mode.

They compute derivatives that the kernels do not: second derivatives, forward mode and the transforms of torch.func. W
is dequantized for the time of the product, and results are rounded as torch's products round them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .operands import GroupLoRA, LoRA, MultiLoRA, Needs, Weight
from .philox import dropped


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return y = x W^T + bias."""
    y = x @ _dense(weight, x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


def grad_x(grad_y: Tensor, weight: Weight) -> Tensor:
    """Return grad_y W in grad_y's dtype."""
    return grad_y @ _dense(weight, grad_y.dtype)


def lora_linear(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA | MultiLoRA) -> tuple[Tensor, Tensor]:
    """Return (y, s) of an op of _lora_op.py."""
    rows = _matrix(x)
    s, update = _low_rank(dropped(rows, lora.seed, lora.dropout_p), lora)
    return linear(x, weight, bias) + update.reshape(*x.shape[:-1], weight.N), s


def lora_backward(
    grad_y: Tensor, x: Tensor, s: Tensor | None, weight: Weight, lora: LoRA | MultiLoRA, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x, grad_A, grad_B) of such an op, empty where not needed.

    s: differentiable in x, and used where A is frozen: x is then not read. Otherwise, and if it is None, it is
    recomputed, because it depends on x and A.
    """
    rows, grad_rows = _matrix(x), _matrix(grad_y)
    given_s = None if needs.need_grad_A else s
    need_x_dropped = needs.need_grad_A or (needs.need_grad_B and given_s is None)
    x_dropped = dropped(rows, lora.seed, lora.dropout_p) if need_x_dropped else rows
    through_dropout = torch.zeros_like(rows)
    grads_A, grads_B = [], []
    for A, B, scaling, mask in _adapters(lora, x.dtype):
        own = grad_rows if mask is None else grad_rows * mask
        if needs.need_grad_B:
            grads_B.append(scaling * (own.T @ (x_dropped @ A.T if given_s is None else given_s)))
        if not needs.need_ds:
            continue
        ds = scaling * (own @ B)
        if needs.need_grad_A:
            grads_A.append(ds.T @ x_dropped)
        if needs.need_grad_x:
            through_dropout = through_dropout + ds @ A
    of_x = x.new_empty(0)
    if needs.need_grad_x:
        through_dropout = dropped(through_dropout, lora.seed, lora.dropout_p)
        of_x = grad_x(grad_y, weight) + through_dropout.reshape(x.shape)
    return of_x, _joined(grads_A, lora, lora.A), _joined(grads_B, lora, lora.B)


def grad_x_of_s(grad_s: Tensor, x_shape: torch.Size, lora: LoRA | MultiLoRA | GroupLoRA) -> Tensor:
    """Return the gradient of x [..., K] for grad_s [M, r], s = dropout(x) A^T."""
    dtype = grad_s.dtype
    if isinstance(lora, MultiLoRA):
        rows = grad_s.new_zeros(grad_s.shape[0], x_shape[-1])
        for e, A in enumerate(lora.A.to(dtype)):
            rows = rows + (grad_s * (lora.adapter == e)[:, None]) @ A
    else:
        rows = grad_s @ lora.A.to(dtype)
    return dropped(rows, lora.seed, lora.dropout_p).reshape(x_shape)


def _joined(grads: list[Tensor], lora: LoRA | MultiLoRA, factor: Tensor) -> Tensor:
    """Return the gradients of all adapters as that of `factor`; empty if there are none."""
    if not grads:
        return factor.new_empty(0)
    return (torch.stack(grads) if isinstance(lora, MultiLoRA) else grads[0]).to(factor.dtype)


def lora_group(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], lora: GroupLoRA
) -> tuple[list[Tensor], Tensor]:
    """Return (ys, s), the results of linear_nf4_lora_group."""
    results = [lora_linear(x, *each) for each in zip(weights, biases, lora.split_per_linear(), strict=True)]
    return [y for y, _ in results], torch.cat([s for _, s in results], dim=1)


def lora_group_backward(
    grad_ys: Sequence[Tensor], x: Tensor, s: Tensor, weights: Sequence[Weight], lora: GroupLoRA, needs: Needs
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return (grad_x, grad_A, grads of B) of linear_nf4_lora_group, empty where not needed; s as in lora_backward."""
    of_x, grads_A, grads_B = x.new_empty(0), [], []
    parts = torch.split(s, lora.ranks, dim=1)
    for grad_y, part, weight, member in zip(grad_ys, parts, weights, lora.split_per_linear(), strict=True):
        of_member, of_A, of_B = lora_backward(grad_y, x, part, weight, member, needs)
        of_x = of_x + of_member if of_x.numel() else of_member
        grads_A.append(of_A)
        grads_B.append(of_B)
    return of_x, torch.cat(grads_A), grads_B


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, s or empty, scale) of ops/rms_norm.py."""
    s = x if residual is None else x + residual
    scale = torch.rsqrt(s.float().square().mean(-1, keepdim=True) + eps)
    n = s.float() * scale
    y = ((1 + weight.float()) * n).to(x.dtype) if weight_offset else weight * n.to(x.dtype)
    return y, x.new_empty(0) if residual is None else s, scale.detach().reshape(-1)


def rms_norm_backward(
    grad_y: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return (grad_x, grad_weight or empty) of ops/rms_norm.py; scale is recomputed, because it depends on s."""
    scale = torch.rsqrt(s.float().square().mean(-1, keepdim=True) + eps)
    n, grad = s.float() * scale, grad_y.float()
    g = grad * (weight.float() + weight_offset)
    grad_x = scale * (g - n * (g * n).mean(-1, keepdim=True))
    grad_x = grad_x if grad_s is None else grad_x + grad_s.float()
    grad_weight = (grad * n).flatten(0, -2).sum(0) if need_grad_weight else weight.new_empty(0)
    return grad_x.to(s.dtype), grad_weight.to(weight.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return (rotated q, rotated k) of ops/rope.py."""
    cosines, sines = cos.float()[:, None], sin.float()[:, None]

    def rotated(x: Tensor) -> Tensor:
        wide = x.float()
        if inverse:
            a, b = (wide * sines).chunk(2, dim=-1)
            turned = torch.cat([b, -a], dim=-1)
        else:
            a, b = wide.chunk(2, dim=-1)
            turned = torch.cat([-b, a], dim=-1) * sines
        return (wide * cosines + turned).to(x.dtype)

    return rotated(q), rotated(k)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return y, the result of the op glu."""
    return (_activated(gate.float(), activation) * up.float()).to(gate.dtype)


def glu_backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return grad_gate and grad_up, the results of glu_backward."""
    g, grad = gate.float(), grad_y.float()
    u = _sigmoid_argument(g, activation)
    sigmoid = torch.sigmoid(u)
    slope = sigmoid + g * sigmoid * torch.sigmoid(-u) * _argument_slope(g, activation)
    return (grad * up.float() * slope).to(gate.dtype), (grad * g * sigmoid).to(up.dtype)


def _activated(g: Tensor, activation: str) -> Tensor:
    return g * torch.sigmoid(_sigmoid_argument(g, activation))


def _sigmoid_argument(g: Tensor, activation: str) -> Tensor:
    """Return u such that the activation is g * sigmoid(u), by (1 + tanh(z)) / 2 = sigmoid(2 z)."""
    if activation == "silu":
        return g
    bounded = g.clamp(-_SATURATED, _SATURATED)
    argument: Tensor = _GELU_LINEAR * (bounded + _GELU_CUBIC * bounded.pow(3))
    return argument


def _argument_slope(g: Tensor, activation: str) -> Tensor | float:
    if activation == "silu":
        return 1.0
    bounded = g.clamp(-_SATURATED, _SATURATED)
    slope: Tensor = _GELU_LINEAR * (1 + 3 * _GELU_CUBIC * bounded.square())
    return slope


_GELU_LINEAR, _GELU_CUBIC = 2 * (2 / torch.pi) ** 0.5, 0.044715
_SATURATED = 32.0
"""Above this magnitude, the sigmoid of gelu_tanh's argument is 0 or 1; much larger cubes would overflow."""


def _low_rank(x_dropped: Tensor, lora: LoRA | MultiLoRA) -> tuple[Tensor, Tensor]:
    """Return (s [M, r], the update of y [M, N])."""
    s, update = x_dropped.new_zeros(x_dropped.shape[0], lora.r), x_dropped.new_zeros(())
    for A, B, scaling, mask in _adapters(lora, x_dropped.dtype):
        part = x_dropped @ A.T
        part = part if mask is None else part * mask
        s, update = s + part, update + scaling * (part @ B.T)
    return s, update.expand(x_dropped.shape[0], lora.B.shape[-2])


def _adapters(lora: LoRA | MultiLoRA, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float | Tensor, Tensor | None]]:
    """Return (A, B, scaling, mask) of each adapter, in x's dtype; mask [M, 1] marks its rows, None means all rows."""
    if isinstance(lora, LoRA):
        return [(lora.A.to(dtype), lora.B.to(dtype), lora.scaling, None)]
    return [
        (lora.A[e].to(dtype), lora.B[e].to(dtype), lora.scalings[e].to(dtype), (lora.adapter == e).to(dtype)[:, None])
        for e in range(lora.A.shape[0])
    ]


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    w: Tensor = torch.ops.qlora_kernels.dequantize_nf4.default(*weight, dtype=dtype)
    return w.view(weight.N, weight.K)


def _matrix(rows: Tensor) -> Tensor:
    return rows.reshape(-1, rows.shape[-1])
