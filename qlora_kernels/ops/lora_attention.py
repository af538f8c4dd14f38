"""lora_attention: o(attention(rope(q(x)), rope(k(x)), v(x))) with four LoRA linears over NF4, as one autograd node.

The node runs the kernels of linear_nf4_lora, rope and attention (lora_projection.py). It saves what these ops save: x,
the rotated q and k, v, the attention's result and log-sums, and the s of each linear. Derivatives of higher order run
on the ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._linear import flatten_to_2d, restore_leading_dims
from .attention import Keys
from .dispatch_fast_path import below_autograd, is_plain_call
from .lora_projection import Projection, gradients_by_ops, run_as_one_node, wanted
from .registry import Problem, select
from .rope import rope
from .tensor_memory import contiguous


class LoRAAttention(NamedTuple):
    """The projections of an attention module, and what it attends to.

    q: [H * D, K], k and v: [KV * D, K], o: [K', H * D].   head_dim: D, even.
    cos, sin: [B or 1, T, D] of x's dtype, constants.   keys: as the op attention takes them.
    """

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    head_dim: int
    cos: Tensor
    sin: Tensor
    keys: Keys


def lora_attention(x: Tensor, attention: LoRAAttention) -> Tensor:
    """Compute attention over the rotated heads of x's projections, and project the result.

    x: [B, T, K], fp32, bf16 or fp16.
    Returns [B, T, K'] of x's dtype. Differentiable in x and the LoRA factors, to any order.
    Raises ValueError or TypeError as the ops linear_nf4_lora, rope and attention do.
    """
    projections = attention[:4]
    factors = [factor for projection in projections for factor in projection.lora[:2]]
    if not _fits(x, attention) or not run_as_one_node(x, projections):
        return _by_ops(x, attention, *factors)
    y: Tensor = LoRAAttentionFunction.apply(x, attention, *factors)  # type: ignore[no-untyped-call]
    return y


def _fits(x: Tensor, attention: LoRAAttention) -> bool:
    q, k, v, o = (projection.weight for projection in attention[:4])
    D, cos, sin, keys = attention.head_dim, attention.cos, attention.sin, attention.keys
    if x.dim() != 3 or not x.shape[-1] == q.K == k.K == v.K or q.N != o.K or k.N != v.N:
        return False
    if D % 2 or q.N % D or k.N % D or q.N % k.N or not is_plain_call(cos, sin, keys.starts, keys.ends):
        return False
    B, T, _ = x.shape
    angles = all(t.shape in ((B, T, D), (1, T, D)) and t.dtype == x.dtype and not t.requires_grad for t in (cos, sin))
    ranges = all(t.shape == (B, T) and t.dtype == torch.int64 and t.is_contiguous() for t in (keys.starts, keys.ends))
    return angles and cos.shape == sin.shape and ranges


def _by_ops(x: Tensor, attention: LoRAAttention, *factors: Tensor) -> Tensor:
    of_q, of_k, of_v, of_o = (factors[i : i + 2] for i in range(0, 8, 2))
    heads = (*x.shape[:-1], -1, attention.head_dim)
    q, k, v = (
        projection.by_op(x, *own).view(heads).transpose(1, 2)
        for projection, own in zip(attention[:3], (of_q, of_k, of_v), strict=True)
    )
    q, k = rope(q, k, attention.cos, attention.sin)
    out = torch.ops.qlora_kernels.attention(q, k, v, *attention.keys)[0]
    return attention.o.by_op(out.reshape(*x.shape[:-1], -1), *of_o)


class LoRAAttentionFunction(torch.autograd.Function):
    """The y of lora_attention and its gradients with respect to x and the factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, attention: LoRAAttention, *factors: Tensor) -> Tensor:
        """Return y, and save what the ops would save."""
        heads = (*x.shape[:-1], -1, attention.head_dim)
        with below_autograd():
            rows = flatten_to_2d(x)
            q, q_s = attention.q.forward(rows)
            k, k_s = attention.k.forward(rows)
            v, v_s = attention.v.forward(rows)
            q, k, v = (t.view(heads).transpose(1, 2) for t in (q, k, v))
            q, k = _rotate(q, k, attention, inverse=False)
            out, log_sums = select(_problem("attention", q, k)).run(q, k, v, attention.keys)
            y, o_s = attention.o.forward(out.view(len(rows), -1))
            ctx.save_for_backward(x, q, k, v, out, log_sums, q_s, k_s, v_s, o_s, *factors)
            ctx.attention = attention
            return restore_leading_dims(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of (x, attention, *factors)."""
        x, q, k, v, out, log_sums, q_s, k_s, v_s, o_s, *factors = ctx.saved_tensors
        attention, need_grad_x = ctx.attention, ctx.needs_input_grad[0]
        if torch.is_grad_enabled() or not is_plain_call(grad_y):
            return gradients_by_ops(lambda *args: _by_ops(args[0], attention, *args[1:]), ctx, grad_y, x, *factors)
        of_q, of_k, of_v, of_o = (factors[i : i + 2] for i in range(0, 8, 2))
        with below_autograd():
            rows = flatten_to_2d(x)
            M = len(rows)
            grad_out, *grads_o = attention.o.backward(flatten_to_2d(grad_y), out.view(M, -1), o_s, *of_o)
            run = select(_problem("attention_backward", q, k)).run
            grad_q, grad_k, grad_v = run(grad_out.view(out.shape), q, k, v, out, log_sums, attention.keys)
            del grad_out
            grad_q, grad_k = _rotate(grad_q.transpose(1, 2), grad_k.transpose(1, 2), attention, inverse=True)
            of_heads = [grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v]
            grad_q, grad_k, grad_v = (contiguous("lora_attention", grad).view(M, -1) for grad in of_heads)
            from_v, *grads_v = attention.v.backward(grad_v, rows, v_s, *of_v, need_grad_x=need_grad_x)
            from_k, *grads_k = attention.k.backward(grad_k, rows, k_s, *of_k, need_grad_x=need_grad_x)
            from_q, *grads_q = attention.q.backward(grad_q, rows, q_s, *of_q, need_grad_x=need_grad_x)
            grad_x = restore_leading_dims(from_v.add_(from_k).add_(from_q), x) if need_grad_x else None
        return grad_x, None, *wanted([*grads_q, *grads_k, *grads_v, *grads_o], ctx.needs_input_grad[2:])


def _rotate(q: Tensor, k: Tensor, attention: LoRAAttention, *, inverse: bool) -> tuple[Tensor, Tensor]:
    cos, sin = (contiguous("lora_attention", angles) for angles in (attention.cos, attention.sin))
    rotated: tuple[Tensor, Tensor] = select(Problem("rope", q.device.type, q.dtype)).run(q, k, cos, sin, inverse)
    return rotated


def _problem(op: str, q: Tensor, k: Tensor) -> Problem:
    return Problem(op, q.device.type, q.dtype, q.shape[2], k.shape[2], q.shape[3])
