"""lora_attention: o(attention(rope(q(x)), rope(k(x)), v(x))) with four linears over NF4, with LoRA or without, as one
autograd node, and with a norm x + o(attention(rope(q(n)), rope(k(n)), v(n))), n = norm(x).

The node runs the kernels of rms_norm, linear_nf4_lora, linear_nf4_lora_group, rope and attention (lora_projection.py),
in one call where the backend has the kernel lora_attention. It saves what these ops save: x, n, the rotated q and k, v,
the attention's result and log-sums, and the s of each linear; n only where the gradient of a lora_A reads it.
Derivatives of higher order run on the ops.

Kernel contract, x [M, K] contiguous with M = B * T, without dropout:
    lora_attention            run(x, module) -> (y [M, K'], LoRAAttentionState)
    lora_attention_backward   run(grad_y, x, module, state, needs) -> (grad_x or None, grad of the norm's weight or
                              None, [grad_A, grad_B of q, k, v and o, or None])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Keys
from .dispatch_fast_path import is_plain_call
from .lora_projection import Projection, SharedInput
from .operands import Needs
from .registry import Problem, select
from .residual_block import (
    BlockFunction,
    BlockGradients,
    BlockNorm,
    NodeNeeds,
    apply_block,
    normalized,
    normalized_backward,
    ops_save_input,
)
from .rope import rope
from .tensor_memory import contiguous


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

    def kept(self, needs: NodeNeeds) -> LoRAAttentionState:
        """Return the state without n where no gradient of a lora_A reads it."""
        return self if any(needs.factors[:6:2]) else self._replace(n=None)

    def complete(self, rows: Tensor) -> LoRAAttentionState:
        """Return the state with x in place of n, without a norm, and in place of an n that was not kept."""
        return self if self.n is not None else self._replace(n=rows)


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

    @property
    def op(self) -> str:
        """The kernel of the whole block."""
        return "lora_attention"

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The projections q, k, v and o."""
        return self[:4]

    @property
    def state_type(self) -> type[LoRAAttentionState]:
        """The type of what backward needs."""
        return LoRAAttentionState

    def with_projections(self, projections: Sequence[Projection], norm: BlockNorm | None) -> LoRAAttention:
        """Return this module with other projections and another norm."""
        q, k, v, o = projections
        return self._replace(q=q, k=k, v=v, o=o, norm=norm)

    def fits(self, x: Tensor) -> bool:
        """Whether the attention of x can run as one node."""
        if not ops_save_input(self[:3], self.norm):
            return False
        q, k, v, o = (projection.weight for projection in self.projections)
        D, cos, sin, keys = self.head_dim, self.cos, self.sin, self.keys
        if x.dim() != 3 or not x.shape[-1] == q.K == k.K == v.K or q.N != o.K or k.N != v.N:
            return False
        if D % 2 or q.N % D or k.N % D or q.N % k.N or not is_plain_call(cos, sin, keys.starts, keys.ends):
            return False
        if self.norm is not None and not (self.norm.fits(x) and o.N == q.K):
            return False
        B, T, _ = x.shape
        shapes = (B, T, D), (1, T, D)
        angles = all(t.shape in shapes and t.dtype == x.dtype and not t.requires_grad for t in (cos, sin))
        ranges = (t.shape == (B, T) and t.dtype == torch.int64 and t.is_contiguous() for t in (keys.starts, keys.ends))
        return angles and cos.shape == sin.shape and all(ranges)

    def by_ops(self, n: Tensor) -> Tensor:
        """Compute o(attention(rope(q(n)), rope(k(n)), v(n))) from ops that are differentiable to any order."""
        heads = (*n.shape[:-1], -1, self.head_dim)
        q, k, v = (y.view(heads).transpose(1, 2) for y in SharedInput(self[:3], n).by_op(n))
        q, k = rope(q, k, self.cos, self.sin)
        out = torch.ops.qlora_kernels.attention.default(q, k, v, *self.keys)[0]
        return self.o.by_op(out.reshape(*n.shape[:-1], -1))

    def run(self, rows: Tensor) -> tuple[Tensor, LoRAAttentionState]:
        """Run the kernel lora_attention as the kernels of its ops."""
        n, scale = normalized(rows, self.norm)
        ys, of_input = SharedInput(self[:3], n).forward(n)
        q, k, v = (self._heads(y) for y in ys)
        del ys
        q, k = self._rotate(q, k, inverse=False)
        out, log_sums = select(_problem("attention", q, k)).run(q, k, v, self.keys)
        out, q, k, v = (_rows(each, len(rows)) for each in (out.transpose(1, 2), q, k, v))
        y, s_o = self.o.forward(out)
        saved_n = None if self.norm is None else n
        state = LoRAAttentionState(saved_n, scale, q, k, v, out, log_sums, s_o, tuple(of_input))
        return y if self.norm is None else y.add_(rows), state

    def run_backward(self, grad_y: Tensor, rows: Tensor, state: LoRAAttentionState, needs: NodeNeeds) -> BlockGradients:
        """Run the kernel lora_attention_backward as the kernels of its ops."""
        M, n = len(rows), state.n
        assert n is not None
        q, k, v = (self._heads(each) for each in (state.q, state.k, state.v))
        grad_out, *grads_o = self.o.backward(grad_y, state.out, state.s_o, Needs(True, *needs.factors[6:]))
        assert grad_out is not None
        grad_out, out = (self._heads(each).transpose(1, 2) for each in (grad_out, state.out))
        run = select(_problem("attention_backward", q, k)).run
        grad_q, grad_k, grad_v = run(grad_out, q, k, v, out, state.log_sums, self.keys)
        del grad_out
        grad_q, grad_k = self._rotate(grad_q.transpose(1, 2), grad_k.transpose(1, 2), inverse=True)
        grads = [_rows(each, M) for each in (grad_q, grad_k, grad_v.transpose(1, 2))]
        need_input = needs.x or needs.norm_weight
        grad_n, of_factors = SharedInput(self[:3], n).backward(
            grads, n, state.of_input, need_grad_x=need_input, need_factors=needs.factors[:6]
        )
        grad_x, grad_weight = normalized_backward(grad_n, grad_y, rows, self.norm, state.scale, needs)
        return grad_x, grad_weight, [*of_factors, *grads_o]

    def _heads(self, rows: Tensor) -> Tensor:
        """Return [M, H * D] as [B, H, T, D]."""
        T, D = self.cos.shape[1:]
        return rows.view(-1, T, rows.shape[1] // D, D).transpose(1, 2)

    def _rotate(self, q: Tensor, k: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        cos, sin = (contiguous("lora_attention", angles) for angles in (self.cos, self.sin))
        rotated: tuple[Tensor, Tensor] = select(Problem("rope", q.device.type, q.dtype)).run(q, k, cos, sin, inverse)
        return rotated


def lora_attention(x: Tensor, attention: LoRAAttention) -> Tensor:
    """Compute attention over the rotated heads of the projections of x, or of norm(x), and project the result.

    x: [B, T, K], fp32, bf16 or fp16.
    Returns [B, T, K'] of x's dtype, with x added if there is a norm. Differentiable in x, the norm's weight and the
    LoRA factors, to any order.
    Raises ValueError or TypeError as the ops rms_norm, linear_nf4, linear_nf4_lora, rope and attention do.
    """
    return apply_block(x, attention, LoRAAttentionFunction)


class LoRAAttentionFunction(BlockFunction):
    """The y of lora_attention and its gradients with respect to x, the norm's weight and the factors."""


def _rows(heads: Tensor, M: int) -> Tensor:
    """Return [B, H, T, D] as [M, H * D]."""
    return contiguous("lora_attention", heads.transpose(1, 2)).view(M, -1)


def _problem(op: str, q: Tensor, k: Tensor) -> Problem:
    return Problem(op, q.device.type, q.dtype, q.shape[2], k.shape[2], q.shape[3])
