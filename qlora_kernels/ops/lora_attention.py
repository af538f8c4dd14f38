"""lora_attention: o(attention(rope(q(x)), rope(k(x)), v(x))) with four linears over NF4, with LoRA or without, as one
autograd node, and with a norm x + o(attention(rope(q(n)), rope(k(n)), v(n))), n = norm(x).

The node runs the kernels of rms_norm, linear_nf4_lora, linear_nf4_lora_group, rope and attention (lora_projection.py),
in one call where the backend has the kernel lora_attention. It saves what these ops save: x, n, the rotated q and k, v,
the attention's result and log-sums, and the s of each linear. Derivatives of higher order run on the ops.

Kernel contract, x [M, K] contiguous with M = B * T, without dropout:
    lora_attention            run(x, module) -> (y [M, K'], LoRAAttentionState)
    lora_attention_backward   run(grad_y, x, module, state, needs) -> (grad_x or None, grad of the norm's weight or
                              None, [grad_A, grad_B of q, k, v and o, or None])
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._linear import flatten_to_2d, restore_leading_dims
from .attention import Keys
from .dispatch_fast_path import below_autograd, is_plain_call
from .lora_projection import Projection, SharedInput, run_as_one_node, wanted, with_seeds
from .operands import Needs
from .registry import Problem, select
from .residual_block import BlockNorm, NodeNeeds, by_ops, gradients_by_ops, kernel_of, normalized, normalized_backward
from .rope import rope
from .tensor_memory import contiguous


class LoRAAttention(NamedTuple):
    """The projections of an attention module, and what it attends to.

    q: [H * D, K], k and v: [KV * D, K], o: [K', H * D].   head_dim: D, even.
    cos, sin: [B or 1, T, D] of x's dtype, constants.   keys: as the op attention takes them.
    norm: of the input, to which the result is added, or None for neither.
    """

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    head_dim: int
    cos: Tensor
    sin: Tensor
    keys: Keys
    norm: BlockNorm | None = None

    def with_tensors(self, norm_weight: Tensor | None, factors: tuple[Tensor | None, ...]) -> LoRAAttention:
        """Return this module with the norm's weight and the factors of q, k, v and o as autograd has them."""
        q, k, v, o = (each.with_factors(*factors[2 * i : 2 * i + 2]) for i, each in enumerate(self[:4]))
        norm = None if self.norm is None or norm_weight is None else self.norm._replace(weight=norm_weight)
        return self._replace(q=q, k=k, v=v, o=o, norm=norm)


class LoRAAttentionState(NamedTuple):
    """What the backward pass needs in addition to x and the parameters.

    n, scale: norm(x) and its scale, or None.   q, k: rotated, q [M, H * D], k and v [M, KV * D].
    out: [M, H * D], log_sums: [B, H, T], of the attention.   s_o: of o, or None.
    of_input: what SharedInput saves for q, k and v.
    """

    n: Tensor | None
    scale: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    log_sums: Tensor
    s_o: Tensor | None
    of_input: tuple[Tensor | None, ...]


def lora_attention(x: Tensor, attention: LoRAAttention) -> Tensor:
    """Compute attention over the rotated heads of the projections of x, or of norm(x), and project the result.

    x: [B, T, K], fp32, bf16 or fp16.
    Returns [B, T, K'] of x's dtype, with x added if there is a norm. Differentiable in x, the norm's weight and the
    LoRA factors, to any order.
    Raises ValueError or TypeError as the ops rms_norm, linear_nf4, linear_nf4_lora, rope and attention do.
    """
    q, k, v, o = with_seeds(attention[:4], x.device)
    attention = attention._replace(q=q, k=k, v=v, o=o)
    factors = [factor for projection in (q, k, v, o) for factor in projection.factors]
    norm_weight = None if attention.norm is None else attention.norm.weight
    if not _fits(x, attention) or not run_as_one_node(x, attention[:4]):
        return _by_ops(attention, x, norm_weight, *factors)
    y: Tensor = LoRAAttentionFunction.apply(attention, x, norm_weight, *factors)  # type: ignore[no-untyped-call]
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
    if attention.norm is not None and not (attention.norm.fits(x) and o.N == q.K):
        return False
    B, T, _ = x.shape
    angles = all(t.shape in ((B, T, D), (1, T, D)) and t.dtype == x.dtype and not t.requires_grad for t in (cos, sin))
    ranges = all(t.shape == (B, T) and t.dtype == torch.int64 and t.is_contiguous() for t in (keys.starts, keys.ends))
    return angles and cos.shape == sin.shape and ranges


def _by_ops(attention: LoRAAttention, x: Tensor, norm_weight: Tensor | None, *factors: Tensor | None) -> Tensor:
    attention = attention.with_tensors(norm_weight, factors)

    def block(n: Tensor) -> Tensor:
        heads = (*n.shape[:-1], -1, attention.head_dim)
        q, k, v = (y.view(heads).transpose(1, 2) for y in SharedInput(attention[:3], n).by_op(n))
        q, k = rope(q, k, attention.cos, attention.sin)
        out = torch.ops.qlora_kernels.attention.default(q, k, v, *attention.keys)[0]
        return attention.o.by_op(out.reshape(*n.shape[:-1], -1))

    return by_ops(x, attention.norm, block)


class LoRAAttentionFunction(torch.autograd.Function):
    """The y of lora_attention and its gradients with respect to x, the norm's weight and the factors."""

    @staticmethod
    def forward(
        ctx: Any, attention: LoRAAttention, x: Tensor, norm_weight: Tensor | None, *factors: Tensor | None
    ) -> Tensor:
        """Return y, and save what the ops would save."""
        with below_autograd():
            rows = flatten_to_2d(x)
            ctx.is_one_kernel = (kernel := kernel_of("lora_attention", x, attention[:4])) is not None
            y, state = _forward(rows, attention) if kernel is None else kernel.run(rows, attention)
            ctx.save_for_backward(x, norm_weight, *factors, *state[:-1], *state.of_input)
            ctx.attention = attention
            return restore_leading_dims(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of (attention, x, norm_weight, *factors)."""
        x, norm_weight, *rest = ctx.saved_tensors
        factors, state = tuple(rest[:8]), LoRAAttentionState._make((*rest[8:16], tuple(rest[16:])))
        attention = ctx.attention
        if torch.is_grad_enabled() or not is_plain_call(grad_y):
            return gradients_by_ops(lambda *inputs: _by_ops(attention, *inputs), ctx, grad_y, x, norm_weight, *factors)
        attention, needs = attention.with_tensors(norm_weight, factors), NodeNeeds.of(ctx)
        with below_autograd():
            kernel = kernel_of("lora_attention_backward", x, attention[:4]) if ctx.is_one_kernel else None
            run = _backward if kernel is None else kernel.run
            grad_x, grad_weight, grads = run(flatten_to_2d(grad_y), flatten_to_2d(x), attention, state, needs)
            grad_x = None if grad_x is None else restore_leading_dims(grad_x, x)
        return None, grad_x, grad_weight, *wanted(grads, needs.factors)


def _forward(rows: Tensor, attention: LoRAAttention) -> tuple[Tensor, LoRAAttentionState]:
    """Run the kernel lora_attention as the kernels of its ops."""
    n, scale = normalized(rows, attention.norm)
    ys, of_input = SharedInput(attention[:3], n).forward(n)
    q, k, v = (_heads(y, attention) for y in ys)
    del ys
    q, k = _rotate(q, k, attention, inverse=False)
    out, log_sums = select(_problem("attention", q, k)).run(q, k, v, attention.keys)
    out, q, k, v = (_rows(each, len(rows)) for each in (out.transpose(1, 2), q, k, v))
    y, s_o = attention.o.forward(out)
    saved_n = None if attention.norm is None else n
    state = LoRAAttentionState(saved_n, scale, q, k, v, out, log_sums, s_o, tuple(of_input))
    return y if attention.norm is None else y.add_(rows), state


def _backward(
    grad_y: Tensor, rows: Tensor, attention: LoRAAttention, state: LoRAAttentionState, needs: NodeNeeds
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Run the kernel lora_attention_backward as the kernels of its ops."""
    M, n = len(rows), rows if state.n is None else state.n
    q, k, v = (_heads(each, attention) for each in (state.q, state.k, state.v))
    grad_out, *grads_o = attention.o.backward(grad_y, state.out, state.s_o, Needs(True, *needs.factors[6:]))
    assert grad_out is not None
    grad_out, out = (_heads(each, attention).transpose(1, 2) for each in (grad_out, state.out))
    run = select(_problem("attention_backward", q, k)).run
    grad_q, grad_k, grad_v = run(grad_out, q, k, v, out, state.log_sums, attention.keys)
    del grad_out
    grad_q, grad_k = _rotate(grad_q.transpose(1, 2), grad_k.transpose(1, 2), attention, inverse=True)
    grads = [_rows(each, M) for each in (grad_q, grad_k, grad_v.transpose(1, 2))]
    need_input = needs.x or needs.norm_weight
    grad_n, of_factors = SharedInput(attention[:3], n).backward(
        grads, n, state.of_input, need_grad_x=need_input, need_factors=needs.factors[:6]
    )
    grad_x, grad_weight = normalized_backward(grad_n, grad_y, rows, attention.norm, state.scale, needs)
    return grad_x, grad_weight, [*of_factors, *grads_o]


def _heads(rows: Tensor, attention: LoRAAttention) -> Tensor:
    """Return [M, H * D] as [B, H, T, D]."""
    T, D = attention.cos.shape[1:]
    return rows.view(-1, T, rows.shape[1] // D, D).transpose(1, 2)


def _rows(heads: Tensor, M: int) -> Tensor:
    """Return [B, H, T, D] as [M, H * D]."""
    return contiguous("lora_attention", heads.transpose(1, 2)).view(M, -1)


def _rotate(q: Tensor, k: Tensor, attention: LoRAAttention, *, inverse: bool) -> tuple[Tensor, Tensor]:
    cos, sin = (contiguous("lora_attention", angles) for angles in (attention.cos, attention.sin))
    rotated: tuple[Tensor, Tensor] = select(Problem("rope", q.device.type, q.dtype)).run(q, k, cos, sin, inverse)
    return rotated


def _problem(op: str, q: Tensor, k: Tensor) -> Problem:
    return Problem(op, q.device.type, q.dtype, q.shape[2], k.shape[2], q.shape[3])
