"""A linear with low-rank updates as a pair of ops, the same for one adapter and for several: all but their kind.

`define_lora_op("linear_nf4_lora", LoRA, check_lora)` makes qlora_kernels::linear_nf4_lora, differentiable in x, bias,
lora_A and lora_B, and qlora_kernels::linear_nf4_lora_backward. Kernel contract, x [M, K] and grad_y [M, N] contiguous,
M, N, K, r >= 1, lora's factors contiguous:

    <op>           run(x, weight, bias, lora) -> (y [M, N], s [M, r]) of x.dtype
    <op>_backward  run(grad_y, x, s, weight, lora, *, need_grad_x)
                   -> (grad_x [M, K] of x.dtype or empty, grad_A, grad_B in lora_A's and lora_B's dtype)
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import _compose
from ._checks import check_bias, check_grad_y, check_s, check_x
from ._implement import compose_derivatives, differentiate, fake, implement, save, saved, spread
from ._linear import BIAS, CONSTANTS, as_rows, bias_alone, grad_bias, is_empty, matrix, problem_of, save_bias_dtype
from ._memory import contiguous
from ._operands import LoRA, MultiLoRA, Weight
from ._registry import select

Adapter = LoRA | MultiLoRA


def define_lora_op(op: str, kind: type[Adapter], check_adapter: Callable[..., None]) -> None:
    """Define `op` and its backward, for adapters of one kind, checked by check_adapter(op, x, weight, lora)."""
    forward, backward = f"qlora_kernels::{op}", f"qlora_kernels::{op}_backward"
    torch.library.define(forward, f"(Tensor x, {Weight.schema()}, Tensor? bias, {kind.schema()}) -> (Tensor, Tensor)")
    torch.library.define(
        backward,
        f"(Tensor grad_y, Tensor x, Tensor s, {Weight.schema()}, {kind.schema()}, bool need_grad_x)"
        " -> (Tensor, Tensor, Tensor)",
    )
    takes_forward = (Tensor, Weight, Tensor, kind)
    takes_backward = (Tensor, Tensor, Tensor, Weight, kind, Tensor)

    def check_forward(x: Tensor, weight: Weight, bias: Tensor | None, lora: Adapter) -> None:
        check_x(op, x, weight)
        check_bias(op, bias, weight.N, x.device)
        check_adapter(op, x, weight, lora)

    def check_backward(grad_y: Tensor, x: Tensor, s: Tensor, weight: Weight, lora: Adapter) -> None:
        check_x(f"{op}_backward", x, weight)
        check_grad_y(f"{op}_backward", grad_y, weight, x)
        check_adapter(f"{op}_backward", x, weight, lora)
        check_s(f"{op}_backward", s, x, lora.r)

    @implement(forward, takes_forward)
    def lora_forward(x: Tensor, weight: Weight, bias: Tensor | None, lora: Adapter) -> tuple[Tensor, Tensor]:
        check_forward(x, weight, bias, lora)
        if is_empty(x, weight):
            return bias_alone(x, weight, bias), x.new_zeros((x.shape[:-1].numel(), lora.r))
        y, s = select(problem_of(op, x, weight, lora)).run(matrix(x), weight, bias, _contiguous(lora))
        return as_rows(y, x), s

    @fake(forward, takes_forward)
    def lora_forward_fake(x: Tensor, weight: Weight, bias: Tensor | None, lora: Adapter) -> tuple[Tensor, Tensor]:
        check_forward(x, weight, bias, lora)
        return x.new_empty((*x.shape[:-1], weight.N)), x.new_empty((x.shape[:-1].numel(), lora.r))

    @implement(backward, takes_backward)
    def lora_backward(
        grad_y: Tensor, x: Tensor, s: Tensor, weight: Weight, lora: Adapter, need_grad_x: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_backward(grad_y, x, s, weight, lora)
        if is_empty(x, weight):
            grad_x = x.new_zeros(x.shape if need_grad_x else (0,))
            return grad_x, torch.zeros_like(lora.A), torch.zeros_like(lora.B)
        run = select(problem_of(f"{op}_backward", x, weight, lora)).run
        grad_x, grad_A, grad_B = run(matrix(grad_y), matrix(x), s, weight, _contiguous(lora), need_grad_x=need_grad_x)
        return as_rows(grad_x, x) if need_grad_x else grad_x, grad_A, grad_B

    @fake(backward, takes_backward)
    def lora_backward_fake(
        grad_y: Tensor, x: Tensor, s: Tensor, weight: Weight, lora: Adapter, need_grad_x: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_backward(grad_y, x, s, weight, lora)
        grad_x = x.new_empty(x.shape if need_grad_x else (0,))
        return grad_x, torch.empty_like(lora.A), torch.empty_like(lora.B)

    def composed(x: Tensor, weight: Weight, bias: Tensor | None, lora: Adapter) -> tuple[Tensor, Tensor]:
        check_forward(x, weight, bias, lora)
        return _compose.lora_linear(x, weight, bias, lora)

    def composed_backward(
        grad_y: Tensor, x: Tensor, s: Tensor, weight: Weight, lora: Adapter, need_grad_x: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_backward(grad_y, x, s, weight, lora)
        return _compose.lora_backward(grad_y, x, weight, lora, need_grad_x)

    run_backward = getattr(torch.ops.qlora_kernels, f"{op}_backward").default

    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *weight = args[:BIAS]
        bias, *lora = args[BIAS:]
        ctx.mark_non_differentiable(output[1])
        save(ctx, x, output[1], *weight, *lora)
        save_bias_dtype(ctx, bias)

    def gradients(ctx: Any, grad_y: Tensor, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:
        need_grad_x = ctx.needs_input_grad[0]
        grad_x, grad_A, grad_B = run_backward(grad_y, *saved(ctx), need_grad_x)
        return grad_x if need_grad_x else None, grad_bias(ctx, grad_y), grad_A, grad_B

    differentiate(
        forward,
        gradients,
        setup_context=setup_context,
        wanted=itemgetter(0, BIAS, BIAS + 1, BIAS + 2),
        compose=spread(composed, takes_forward),
        constants=(*CONSTANTS, "scalings") if kind is MultiLoRA else CONSTANTS,
    )
    compose_derivatives(backward, spread(composed_backward, takes_backward))


def _contiguous(lora: Adapter) -> Adapter:
    """Kernels walk the factors row by row."""
    if lora.A.is_contiguous() and lora.B.is_contiguous():
        return lora
    return lora._replace(A=contiguous("lora_A", lora.A), B=contiguous("lora_B", lora.B))
