"""linear_nf4_lora: y = x W^T + bias + scaling * (dropout(x) A^T) B^T with W in NF4, and its three gradients.

Ops: qlora_kernels::linear_nf4_lora (differentiable in x, bias, lora_A, lora_B) and
qlora_kernels::linear_nf4_lora_backward.

Kernel contract: _lora_op.py's, with lora: LoRA.

    s = dropout(x) A^T                      ds     = scaling * grad_y B
    y = x W^T + bias + scaling * s B^T      grad_B = scaling * grad_y^T s
                                            grad_A = ds^T dropout(x)
                                            grad_x = grad_y W + dropout'(ds A)

lora_A and lora_B are used in x's dtype, whatever dtype their master copies have; sums are kept in fp32. Between the
passes only x and s are saved: backward regenerates the dropout mask from the seed (ops/_philox.py) and decodes W again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..format.quant_state import QuantState
from ._checks import check_lora
from ._lora_op import define_lora_op
from ._operands import LoRA, weight_of

define_lora_op("linear_nf4_lora", LoRA, check_lora)


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
    """y = x W^T + bias + scaling * (dropout(x) A^T) B^T in one op, forward and backward.

    x: [..., K], fp32, bf16 or fp16.   packed, state: from `quantize_nf4`, of a weight [N, K].
    lora_A: [r, K], lora_B: [N, r], any of the three dtypes, usually fp32 masters.   bias: [N] or None.
    scaling: lora_alpha / r.   dropout_p: in [0, 1).
    seed: int64, one element, on x's device; drawn from torch's generator where dropout_p > 0 and none is given.
    Returns y [..., N] of x.dtype. Differentiable in x, bias, lora_A and lora_B.
    Raises ValueError or TypeError, naming the argument; NotImplementedError where a forced backend cannot serve.
    Source: LoRA (arXiv:2106.09685) section 4.1 over QLoRA (arXiv:2305.14314) equation 5.
    """
    weight = weight_of("linear_nf4_lora", packed, state)
    lora = LoRA(lora_A, lora_B, seed_for(dropout_p, x.device, seed), scaling, dropout_p)
    y: Tensor = torch.ops.qlora_kernels.linear_nf4_lora(x, *weight, bias, *lora)[0]
    return y


def seed_for(dropout_p: float, device: torch.device, seed: Tensor | None = None) -> Tensor | None:
    """None without dropout; else `seed`, or a fresh one."""
    if dropout_p <= 0:
        return None
    return draw_seed(device) if seed is None else seed


def draw_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed, int64 [1], from `device`'s torch generator: reproducible under torch.manual_seed."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
