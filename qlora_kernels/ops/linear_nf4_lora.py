"""linear_nf4_lora: y = x W^T + bias + scaling * (dropout(x) A^T) B^T with W in NF4, and its three gradients.

Ops: qlora_kernels::linear_nf4_lora (differentiable in x, bias, lora_A, lora_B) and
qlora_kernels::linear_nf4_lora_backward.

Kernel contract: _lora_op.py's, with lora: LoRA.

    s = dropout(x) A^T                      ds     = scaling * grad_y B
    y = x W^T + bias + scaling * s B^T      grad_B = scaling * grad_y^T s
                                            grad_A = ds^T dropout(x)
                                            grad_x = grad_y W + dropout'(ds A)

lora_A and lora_B are rounded to x's dtype from masters of any dtype; sums are fp32. Only x and s are saved for
backward, each only where its factor's gradient is needed. Backward regenerates the dropout mask from the seed
(ops/philox.py) and decodes W again.
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
from .checks import check_lora
from .operands import LoRA, Weight, weight_of


class LinearNF4LoRAFunction(torch.autograd.Function):
    """The y of linear_nf4_lora and its gradients with respect to x, the bias, lora_A and lora_B.

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
        lora: LoRA,
        run: Callable[..., Any],
    ) -> tuple[Tensor, Tensor]:
        """Return (y, s) and save the factors for backward, x where grad_A is needed, and s where grad_B is."""
        y, s = run(x, *weight, bias, *lora)
        need_grad_x, _, need_grad_A, need_grad_B, *_ = ctx.needs_input_grad
        rows = rows_to_save(ctx, x, s, need_grad_x, need_grad_A, need_grad_B)
        ctx.save_for_backward(*rows, lora_A, lora_B, lora.seed, weight.packed, *weight.constants)
        ctx.blocksize, ctx.N, ctx.K = weight.blocksize, weight.N, weight.K
        ctx.scaling, ctx.dropout_p = lora.scaling, lora.dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, s

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of (x, bias, lora_A, lora_B, weight, lora, run)."""
        x, s, lora_A, lora_B, seed, *of_weight = ctx.saved_tensors
        weight = Weight._make((*of_weight, ctx.blocksize, ctx.N, ctx.K))
        lora = LoRA(lora_A, lora_B, seed, ctx.scaling, ctx.dropout_p)
        of_s = None if grad_s is None else compose.grad_x_of_s(grad_s, ctx.x_shape, lora)
        if grad_y is None:
            return of_s, None, None, None, None, None, None
        need_grad_x, need_grad_bias, need_grad_A, need_grad_B, *_ = ctx.needs_input_grad
        x, s = saved_rows(ctx, grad_y, x, s)
        grad_x, grad_A, grad_B = torch.ops.qlora_kernels.linear_nf4_lora_backward.default(
            grad_y, x, s, *weight, *lora, need_grad_x, need_grad_A, need_grad_B
        )
        grad_bias = sum_over_rows(grad_y, ctx.bias_dtype) if need_grad_bias else None
        grad_x = None if not need_grad_x else grad_x if of_s is None else grad_x + of_s
        grad_A, grad_B = grad_A if need_grad_A else None, grad_B if need_grad_B else None
        return grad_x, grad_bias, grad_A, grad_B, None, None, None


def _apply(
    x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA, run: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    y, s = LinearNF4LoRAFunction.apply(x, bias, lora.A, lora.B, weight, lora, run)  # type: ignore[no-untyped-call]
    return y, s


LoRAOp("linear_nf4_lora", LoRA, check_lora).define(_apply)


def linear_nf4_lora(
    x: Tensor,
    packed: Tensor,
    state: QuantState,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute y = x W^T + bias + scaling * (dropout(x) A^T) B^T in one op, forward and backward.

    x: [..., K], fp32, bf16 or fp16.   packed, state: from `quantize_nf4`, of a weight [N, K].
    lora_A: [r, K], lora_B: [N, r], any of the three dtypes, usually fp32 masters.   bias: [N] or None.
    scaling: lora_alpha / r.   dropout_p: in [0, 1).
    seed: int64, one element, on x's device; if it is None and dropout_p > 0, it is drawn from torch's generator.
    Returns y [..., N] of x.dtype. Differentiable in x, bias, lora_A and lora_B.
    Raises ValueError or TypeError, naming the argument; NotImplementedError where a forced backend cannot serve.
    Source: LoRA (arXiv:2106.09685) section 4.1 over QLoRA (arXiv:2305.14314) equation 5.
    """
    weight = weight_of("linear_nf4_lora", packed, state)
    lora = LoRA(lora_A, lora_B, seed_for(dropout_p, x.device, seed), scaling, dropout_p)
    y: Tensor = torch.ops.qlora_kernels.linear_nf4_lora.default(x, *weight, bias, *lora)[0]
    return y


def seed_for(dropout_p: float, device: torch.device, seed: Tensor | None = None) -> Tensor | None:
    """Return None without dropout, otherwise `seed`, or a new seed if it is None."""
    if dropout_p <= 0:
        return None
    return draw_seed(device) if seed is None else seed


def draw_seed(device: torch.device) -> Tensor:
    """Return a new dropout seed, int64 [1], from `device`'s torch generator: reproducible under torch.manual_seed."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
