"""linear_nf4_lora_group: LoRA linears over NF4 that read the same x, such as q, k and v, as one op.

    s   = dropout(x) A^T, A = [A_1; A_2; ...], one mask    ds_i     = scaling_i * grad_y_i B_i,  ds = [ds_1 ds_2 ...]
    y_i = x W_i^T + bias_i + scaling_i * s_i B_i^T         grad_B_i = scaling_i * grad_y_i^T s_i
                                                           grad_A   = ds^T dropout(x)
                                                           grad_x   = sum_i grad_y_i W_i + dropout'(ds A)

y_i equals the result of linear_nf4_lora with the same seed; x is read once for all adapters, and grad_x is one sum.

Ops: qlora_kernels::linear_nf4_lora_group (differentiable in x, lora_A, lora_B; biases are constants) and
qlora_kernels::linear_nf4_lora_group_backward. A list in a schema has an entry for each linear.

Kernel contract: x [M, K] and grad_y_i [M, N_i] contiguous, M, K, N_i, r_i >= 1; lora: GroupLoRA, factors contiguous.
    linear_nf4_lora_group           run(x, weights, biases, lora) -> ([y_i [M, N_i]], s [M, sum of r_i]) of x.dtype
    linear_nf4_lora_group_backward  run(grad_ys, x, s, weights, lora, needs)
                                    -> (grad_x [M, K] of x.dtype, grad_A, [grad_B_i]), empty where not needed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..format.quant_state import QuantState
from . import compose
from ._implement import compose_derivatives, differentiate, fake, implement
from ._linear import CONSTANTS, bias_only_output, flatten_to_2d, is_empty, problem_of, restore_leading_dims
from ._saved_rows import rows_to_save, saved_rows
from .checks import check_bias, check_grad_y, check_lora, check_s, check_x
from .linear_nf4_lora import seed_for
from .operands import GroupLoRA, Needs, Weight, WeightLists, weight_of
from .registry import Problem, select
from .tensor_memory import contiguous

_OP, _BACKWARD_OP = "linear_nf4_lora_group", "linear_nf4_lora_group_backward"
_FORWARD = (Tensor, Tensor, WeightLists, GroupLoRA)
_BACKWARD = (Tensor, Tensor, Tensor, WeightLists, GroupLoRA, Needs)
torch.library.define(
    f"qlora_kernels::{_OP}",
    f"(Tensor x, Tensor?[] biases, {WeightLists.schema()}, {GroupLoRA.schema()}) -> (Tensor[], Tensor)",
)
torch.library.define(
    f"qlora_kernels::{_BACKWARD_OP}",
    f"(Tensor[] grad_ys, Tensor x, Tensor s, {WeightLists.schema()}, {GroupLoRA.schema()}, {Needs.schema()})"
    " -> (Tensor, Tensor, Tensor[])",
)


def linear_nf4_lora_group(
    x: Tensor,
    packed: Sequence[Tensor],
    states: Sequence[QuantState],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scalings: Sequence[float],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """Compute x W_i^T + bias_i + scaling_i * (dropout(x) A_i^T) B_i^T for each linear i, with one dropout mask.

    Sequences have an entry for each linear; entries, dropout_p and seed are as for linear_nf4_lora.
    Returns y_i [..., N_i] of x.dtype. Differentiable in x, lora_A and lora_B; biases are constants.
    Raises ValueError or TypeError, naming the argument; NotImplementedError where a forced backend cannot serve.
    """
    weights = [weight_of(_OP, *pair) for pair in zip(packed, states, strict=True)]
    lora = GroupLoRA(torch.cat(list(lora_A)), lora_B, seed_for(dropout_p, x.device, seed), scalings, dropout_p)
    return call_group(x, weights, biases or [None] * len(weights), lora)


def call_group(x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], lora: GroupLoRA) -> list[Tensor]:
    """Call the op with its arguments given as bundles."""
    A, B, seed, scalings, dropout_p = lora
    factors = (A, list(B), seed, list(scalings), dropout_p)
    lists = WeightLists.of(weights)
    ys: list[Tensor] = torch.ops.qlora_kernels.linear_nf4_lora_group.default(x, list(biases), *lists, *factors)[0]
    return ys


@implement(f"qlora_kernels::{_OP}", _FORWARD)
def linear_nf4_lora_group_impl(
    x: Tensor, biases: Sequence[Tensor | None], lists: WeightLists, lora: GroupLoRA
) -> tuple[list[Tensor], Tensor]:
    """Check the arguments, then run the selected kernel over x as a matrix."""
    weights = lists.weights()
    _check_forward(x, biases, weights, lora)
    if any(is_empty(x, weight) for weight in weights):
        empty = [bias_only_output(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return empty, x.new_zeros(x.shape[:-1].numel(), lora.r)
    ys, s = select(problem_of_group(_OP, x, weights, lora)).run(flatten_to_2d(x), weights, biases, _contiguous(lora))
    return [restore_leading_dims(y, x) for y in ys], s


@fake(f"qlora_kernels::{_OP}", _FORWARD)
def linear_nf4_lora_group_fake(
    x: Tensor, biases: Sequence[Tensor | None], lists: WeightLists, lora: GroupLoRA
) -> tuple[list[Tensor], Tensor]:
    """Return empty tensors with the shapes and dtypes of the ys and of s."""
    weights = lists.weights()
    _check_forward(x, biases, weights, lora)
    ys = [x.new_empty((*x.shape[:-1], weight.N)) for weight in weights]
    return ys, x.new_empty((x.shape[:-1].numel(), lora.r))


def linear_nf4_lora_group_composed(
    x: Tensor, biases: Sequence[Tensor | None], lists: WeightLists, lora: GroupLoRA
) -> tuple[list[Tensor], Tensor]:
    """Check the arguments, then compose the ys and s of torch's ops."""
    weights = lists.weights()
    _check_forward(x, biases, weights, lora)
    return compose.lora_group(x, weights, biases, lora)


@implement(f"qlora_kernels::{_BACKWARD_OP}", _BACKWARD)
def linear_nf4_lora_group_backward_impl(
    grad_ys: Sequence[Tensor], x: Tensor, s: Tensor, lists: WeightLists, lora: GroupLoRA, needs: Needs
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Check the arguments, then run the selected kernel over x and the grad_ys as matrices."""
    weights = lists.weights()
    _check_backward(grad_ys, x, s, weights, lora)
    if any(is_empty(x, weight) for weight in weights):
        return _only(needs, torch.zeros_like(x), torch.zeros_like(lora.A), [torch.zeros_like(B) for B in lora.B])
    run = select(problem_of_group(_BACKWARD_OP, x, weights, lora)).run
    rows = [flatten_to_2d(grad_y) for grad_y in grad_ys]
    grad_x, grad_A, grads_B = run(rows, flatten_to_2d(x), s, weights, _contiguous(lora), needs)
    return grad_x.view(x.shape) if needs.need_grad_x else grad_x, grad_A, grads_B


@fake(f"qlora_kernels::{_BACKWARD_OP}", _BACKWARD)
def linear_nf4_lora_group_backward_fake(
    grad_ys: Sequence[Tensor], x: Tensor, s: Tensor, lists: WeightLists, lora: GroupLoRA, needs: Needs
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return empty tensors with the shapes and dtypes of the gradients."""
    _check_backward(grad_ys, x, s, lists.weights(), lora)
    return _only(needs, x.new_empty(x.shape), torch.empty_like(lora.A), [torch.empty_like(B) for B in lora.B])


def linear_nf4_lora_group_backward_composed(
    grad_ys: Sequence[Tensor], x: Tensor, s: Tensor, lists: WeightLists, lora: GroupLoRA, needs: Needs
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Check the arguments, then compose the gradients of torch's ops."""
    weights = lists.weights()
    _check_backward(grad_ys, x, s, weights, lora)
    return compose.lora_group_backward(grad_ys, x, s, weights, lora, needs)


def _only(
    needs: Needs, grad_x: Tensor, grad_A: Tensor, grads_B: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the gradients, with an empty tensor in place of each that is not needed."""
    return (
        grad_x if needs.need_grad_x else grad_x.new_empty(0),
        grad_A if needs.need_grad_A else grad_A.new_empty(0),
        [grad_B if needs.need_grad_B else grad_B.new_empty(0) for grad_B in grads_B],
    )


class LinearNF4LoRAGroupFunction(torch.autograd.Function):
    """The ys of linear_nf4_lora_group and their gradients with respect to x, lora_A and each lora_B.

    Autograd inspects the arguments but not the fields of bundles, so lora_A and the lora_B are also passed separately.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        biases: Sequence[Tensor | None],
        lists: WeightLists,
        lora: GroupLoRA,
        run: Callable[..., Any],
        lora_A: Tensor,
        *lora_B: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return (*ys, s) and save the factors for backward, x where grad_A is needed, and s where a grad_B is."""
        ys, s = run(x, biases, *lists, *lora)
        need_grad_x, *_, need_grad_A = ctx.needs_input_grad[:6]
        rows = rows_to_save(ctx, x, s, need_grad_x, need_grad_A, any(ctx.needs_input_grad[6:]))
        of_weights = (lists.packed, lists.absmax, lists.absmax_q, lists.absmax_scale, lists.absmax_offset)
        ctx.save_for_backward(*rows, lora.seed, lora_A, *lora_B, *chain(*of_weights))
        ctx.n_linears, ctx.blocksizes, ctx.N, ctx.K = len(lora_B), lists.blocksizes, lists.N, lists.K
        ctx.scalings, ctx.dropout_p = lora.scalings, lora.dropout_p
        ctx.y_shapes = [y.shape for y in ys]
        return *ys, s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of (x, biases, lists, lora, run, lora_A, *lora_B)."""
        *given, grad_s = grads
        x, s, seed, lora_A, *rest = ctx.saved_tensors
        lora_B, *of_weights = [rest[i : i + ctx.n_linears] for i in range(0, len(rest), ctx.n_linears)]
        lists = WeightLists._make((*of_weights, ctx.blocksizes, ctx.N, ctx.K))
        lora = GroupLoRA(lora_A, lora_B, seed, ctx.scalings, ctx.dropout_p)
        of_s = None if grad_s is None else compose.grad_x_of_s(grad_s, ctx.x_shape, lora)
        present = [grad_y for grad_y in given if grad_y is not None]
        if not present:
            return of_s, *[None] * (5 + ctx.n_linears)
        grad_ys = [
            present[0].new_zeros(shape) if y is None else y for y, shape in zip(given, ctx.y_shapes, strict=True)
        ]
        need_grad_x, *_, need_grad_A = ctx.needs_input_grad[:6]
        need_grads_B = ctx.needs_input_grad[6:]
        x, s = saved_rows(ctx, present[0], x, s)
        grad_x, grad_A, grads_B = torch.ops.qlora_kernels.linear_nf4_lora_group_backward.default(
            grad_ys, x, s, *lists, *lora, need_grad_x, need_grad_A, any(need_grads_B)
        )
        of_B = [grad_B if need else None for grad_B, need in zip(grads_B, need_grads_B, strict=True)]
        of_x = None if not need_grad_x else grad_x if of_s is None else grad_x + of_s
        of_A = grad_A if need_grad_A else None
        return of_x, None, None, None, None, of_A, *of_B


def _apply(
    x: Tensor, biases: Sequence[Tensor | None], lists: WeightLists, lora: GroupLoRA, run: Callable[..., Any]
) -> tuple[list[Tensor], Tensor]:
    outputs = LinearNF4LoRAGroupFunction.apply(x, biases, lists, lora, run, lora.A, *lora.B)  # type: ignore[no-untyped-call]
    *ys, s = outputs
    return ys, s


differentiate(
    f"qlora_kernels::{_OP}",
    _FORWARD,
    _apply,
    compose=linear_nf4_lora_group_composed,
    constants=("biases", *CONSTANTS),
)
compose_derivatives(f"qlora_kernels::{_BACKWARD_OP}", _BACKWARD, linear_nf4_lora_group_backward_composed)


def problem_of_group(op: str, x: Tensor, weights: Sequence[Weight], lora: GroupLoRA) -> Problem:
    """Return the Problem of a call of one of the two ops, with N the sum over the linears."""
    one = problem_of(op, x, weights[0], lora)
    every = all(weight.double_quant for weight in weights)
    return one._replace(N=sum(weight.N for weight in weights), double_quant=every)


def _contiguous(lora: GroupLoRA) -> GroupLoRA:
    return lora._replace(A=contiguous("lora_A", lora.A), B=[contiguous("lora_B", B) for B in lora.B])


def _check_forward(x: Tensor, biases: Sequence[Tensor | None], weights: Sequence[Weight], lora: GroupLoRA) -> None:
    if not len(biases) == len(weights) == len(lora.B) == len(lora.scalings):
        counts = f"{len(weights)} weights, {len(biases)} biases, {len(lora.B)} lora_B, {len(lora.scalings)} scalings"
        raise ValueError(f"{_OP}: every linear must have each of its arguments, got {counts}")
    _check_group(_OP, lora)
    for weight, bias, member in zip(weights, biases, lora.split_per_linear(), strict=True):
        check_x(_OP, x, weight)
        check_bias(_OP, bias, weight.N, x.device)
        check_lora(_OP, x, weight, member)


def _check_backward(
    grad_ys: Sequence[Tensor], x: Tensor, s: Tensor, weights: Sequence[Weight], lora: GroupLoRA
) -> None:
    if not len(grad_ys) == len(weights) == len(lora.B) == len(lora.scalings):
        counts = f"{len(weights)} weights, {len(grad_ys)} grad_ys, {len(lora.B)} lora_B, {len(lora.scalings)} scalings"
        raise ValueError(f"{_BACKWARD_OP}: every linear must have each of its arguments, got {counts}")
    check_s(_BACKWARD_OP, s, x, lora.r)
    _check_group(_BACKWARD_OP, lora)
    for grad_y, weight, member in zip(grad_ys, weights, lora.split_per_linear(), strict=True):
        check_x(_BACKWARD_OP, x, weight)
        check_grad_y(_BACKWARD_OP, grad_y, weight, x)
        check_lora(_BACKWARD_OP, x, weight, member)


def _check_group(op: str, lora: GroupLoRA) -> None:
    if not lora.B:
        raise ValueError(f"{op}: a group must have at least one linear, got none")
    for B in lora.B:
        if B.dim() != 2:
            raise ValueError(f"{op}: lora_B must have two dimensions each, got shape {tuple(B.shape)}")
    if lora.A.dim() != 2:
        raise ValueError(f"{op}: lora_A must have two dimensions, got shape {tuple(lora.A.shape)}")
    if lora.r != sum(lora.ranks):
        raise ValueError(f"{op}: lora_A must have as many rows as lora_B have columns, {lora.ranks}, got {lora.r}")
