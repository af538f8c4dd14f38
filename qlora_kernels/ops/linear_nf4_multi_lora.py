"""linear_nf4_multi_lora: a LoRA linear over NF4 in which each row of the batch has its own adapter number.

    y[m] = W x[m] + bias + scalings[e] * B_e A_e dropout(x[m])      with e = adapter[m];   no low-rank part where e = -1

Ops: qlora_kernels::linear_nf4_multi_lora (differentiable in x, bias, lora_A, lora_B) and
qlora_kernels::linear_nf4_multi_lora_backward.

Kernel contract: _lora_op.py's, with lora: MultiLoRA, E >= 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..format.quant_state import QuantState
from . import compose
from ._linear import sum_over_rows
from ._lora_op import LoRAOp
from ._saved_rows import rows_to_save, saved_rows
from .checks import check_multi_lora
from .linear_nf4_lora import seed_for
from .operands import MultiLoRA, Weight, weight_of


class LinearNF4MultiLoRAFunction(torch.autograd.Function):
    """The y of linear_nf4_multi_lora and its gradients with respect to x, the bias, lora_A and lora_B.

    Autograd inspects the arguments but not the fields of a bundle, so lora_A and lora_B are also passed separately.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        weight: Weight,
        lora: MultiLoRA,
        run: Callable[..., Any],
    ) -> tuple[Tensor, Tensor]:
        """Return (y, s) and save the factors for backward, x where grad_A is needed, and s where grad_B is."""
        y, s = run(x, *weight, bias, *lora)
        need_grad_x, _, need_grad_A, need_grad_B, *_ = ctx.needs_input_grad
        rows = rows_to_save(ctx, x, s, need_grad_x, need_grad_A, need_grad_B)
        of_lora = (lora_A, lora_B, lora.scalings, lora.adapter, lora.seed)
        ctx.save_for_backward(*rows, *of_lora, weight.packed, *weight.constants)
        ctx.blocksize, ctx.N, ctx.K = weight.blocksize, weight.N, weight.K
        ctx.dropout_p = lora.dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, s

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of (x, bias, lora_A, lora_B, weight, lora, run)."""
        x, s, lora_A, lora_B, scalings, adapter, seed, *of_weight = ctx.saved_tensors
        weight = Weight._make((*of_weight, ctx.blocksize, ctx.N, ctx.K))
        lora = MultiLoRA(lora_A, lora_B, scalings, adapter, seed, ctx.dropout_p)
        of_s = None if grad_s is None else compose.grad_x_of_s(grad_s, ctx.x_shape, lora)
        if grad_y is None:
            return of_s, None, None, None, None, None, None
        need_grad_x, need_grad_bias, need_grad_A, need_grad_B, *_ = ctx.needs_input_grad
        x, s = saved_rows(ctx, grad_y, x, s)
        grad_x, grad_A, grad_B = torch.ops.qlora_kernels.linear_nf4_multi_lora_backward.default(
            grad_y, x, s, *weight, *lora, need_grad_x, need_grad_A, need_grad_B
        )
        grad_bias = sum_over_rows(grad_y, ctx.bias_dtype) if need_grad_bias else None
        grad_x = None if not need_grad_x else grad_x if of_s is None else grad_x + of_s
        grad_A, grad_B = grad_A if need_grad_A else None, grad_B if need_grad_B else None
        return grad_x, grad_bias, grad_A, grad_B, None, None, None


def _apply(
    x: Tensor, weight: Weight, bias: Tensor | None, lora: MultiLoRA, run: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    y, s = LinearNF4MultiLoRAFunction.apply(x, bias, lora.A, lora.B, weight, lora, run)  # type: ignore[no-untyped-call]
    return y, s


LoRAOp("linear_nf4_multi_lora", MultiLoRA, check_multi_lora, constants=("scalings",)).define(_apply)


def linear_nf4_multi_lora(
    x: Tensor,
    packed: Tensor,
    state: QuantState,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    adapter: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute y[m] = W x[m] + bias + scalings[e] * B_e A_e dropout(x[m]) with e = adapter[m], forward and backward.

    x: [..., K], fp32, bf16 or fp16.   packed, state: from `quantize_nf4`, of a weight [N, K].
    lora_A: [E, r, K], lora_B: [E, N, r]; adapters of smaller rank are padded with zeros.   scalings: fp32 [E].
    adapter: int64, one per row of x, 0..E-1, or -1 for the base alone.   bias: [N] or None.
    dropout_p, seed: as for linear_nf4_lora.
    Returns y [..., N] of x.dtype. Differentiable in x, bias, lora_A and lora_B.
    Raises ValueError or TypeError, naming the argument.
    """
    weight = weight_of("linear_nf4_multi_lora", packed, state)
    lora = MultiLoRA(lora_A, lora_B, scalings, adapter, seed_for(dropout_p, x.device, seed), dropout_p)
    y: Tensor = torch.ops.qlora_kernels.linear_nf4_multi_lora.default(x, *weight, bias, *lora)[0]
    return y
