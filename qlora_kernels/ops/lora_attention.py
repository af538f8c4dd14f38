"""lora_attention: o(attention(rope(q(x)), rope(k(x)), v(x))) with four linears over NF4, with LoRA or without, as one
autograd node.

The node runs the kernels of linear_nf4_lora, linear_nf4_lora_group, rope and attention (lora_projection.py). It saves
what these ops save: x, the rotated q and k, v, the attention's result and log-sums, and the s of each linear.
Derivatives of higher order run on the ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._linear import flatten_to_2d, restore_leading_dims
from .attention import Keys
from .dispatch_fast_path import below_autograd, is_plain_call
from .lora_projection import Projection, SharedInput, gradients_by_ops, run_as_one_node, wanted, with_seeds
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

    def with_factors(self, factors: tuple[Tensor | None, ...]) -> LoRAAttention:
        """Return this module with the factors of q, k, v and o as autograd passes or saved them."""
        q, k, v, o = (each.with_factors(*factors[2 * i : 2 * i + 2]) for i, each in enumerate(self[:4]))
        return self._replace(q=q, k=k, v=v, o=o)


def lora_attention(x: Tensor, attention: LoRAAttention) -> Tensor:
    """Compute attention over the rotated heads of x's projections, and project the result.

    x: [B, T, K], fp32, bf16 or fp16.
    Returns [B, T, K'] of x's dtype. Differentiable in x and the LoRA factors, to any order.
    Raises ValueError or TypeError as the ops linear_nf4, linear_nf4_lora, rope and attention do.
    """
    q, k, v, o = with_seeds(attention[:4], x.device)
    attention = attention._replace(q=q, k=k, v=v, o=o)
    factors = [factor for projection in (q, k, v, o) for factor in projection.factors]
    if not _fits(x, attention) or not run_as_one_node(x, attention[:4]):
        return _by_ops(x, attention, *factors)
    y: Tensor = LoRAAttentionFunction.apply(x, attention, *factors)  # type: ignore[no-untyped-call]
    return y


def _fits(x: Tensor, attention: LoRAAttention) -> bool:
    if all(projection.lora is None for projection in attention[:3]):  # the ops need not save x
        return False
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


def _by_ops(x: Tensor, attention: LoRAAttention, *factors: Tensor | None) -> Tensor:
    attention = attention.with_factors(factors)
    heads = (*x.shape[:-1], -1, attention.head_dim)
    q, k, v = (y.view(heads).transpose(1, 2) for y in SharedInput(attention[:3], x).by_op(x))
    q, k = rope(q, k, attention.cos, attention.sin)
    out = torch.ops.qlora_kernels.attention(q, k, v, *attention.keys)[0]
    return attention.o.by_op(out.reshape(*x.shape[:-1], -1))


class LoRAAttentionFunction(torch.autograd.Function):
    """The y of lora_attention and its gradients with respect to x and the factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, attention: LoRAAttention, *factors: Tensor | None) -> Tensor:
        """Return y, and save what the ops would save."""
        heads = (*x.shape[:-1], -1, attention.head_dim)
        with below_autograd():
            rows = flatten_to_2d(x)
            ys, of_x = SharedInput(attention[:3], rows).forward(rows)
            q, k, v = (y.view(heads).transpose(1, 2) for y in ys)
            del ys
            q, k = _rotate(q, k, attention, inverse=False)
            out, log_sums = select(_problem("attention", q, k)).run(q, k, v, attention.keys)
            y, of_out = attention.o.forward(out.view(len(rows), -1))
            ctx.save_for_backward(x, q, k, v, out, log_sums, of_out, *of_x, *factors)
            ctx.attention = attention
            return restore_leading_dims(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of (x, attention, *factors)."""
        x, q, k, v, out, log_sums, of_out, *rest = ctx.saved_tensors
        of_x, factors = rest[:-8], rest[-8:]
        attention, need_grad_x = ctx.attention, ctx.needs_input_grad[0]
        if torch.is_grad_enabled() or not is_plain_call(grad_y):
            return gradients_by_ops(lambda *args: _by_ops(args[0], attention, *args[1:]), ctx, grad_y, x, *factors)
        attention = attention.with_factors(factors)
        with below_autograd():
            rows = flatten_to_2d(x)
            M = len(rows)
            grad_out, *grads_o = attention.o.backward(flatten_to_2d(grad_y), out.view(M, -1), of_out)
            assert grad_out is not None
            run = select(_problem("attention_backward", q, k)).run
            grad_q, grad_k, grad_v = run(grad_out.view(out.shape), q, k, v, out, log_sums, attention.keys)
            del grad_out
            grad_q, grad_k = _rotate(grad_q.transpose(1, 2), grad_k.transpose(1, 2), attention, inverse=True)
            of_heads = [grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v]
            grads = [contiguous("lora_attention", grad).view(M, -1) for grad in of_heads]
            grad_x, of_factors = SharedInput(attention[:3], rows).backward(grads, rows, of_x, need_grad_x=need_grad_x)
            grad_x = None if grad_x is None else restore_leading_dims(grad_x, x)
        return grad_x, None, *wanted([*of_factors, *grads_o], ctx.needs_input_grad[2:])


def _rotate(q: Tensor, k: Tensor, attention: LoRAAttention, *, inverse: bool) -> tuple[Tensor, Tensor]:
    cos, sin = (contiguous("lora_attention", angles) for angles in (attention.cos, attention.sin))
    rotated: tuple[Tensor, Tensor] = select(Problem("rope", q.device.type, q.dtype)).run(q, k, cos, sin, inverse)
    return rotated


def _problem(op: str, q: Tensor, k: Tensor) -> Problem:
    return Problem(op, q.device.type, q.dtype, q.shape[2], k.shape[2], q.shape[3])
