"""linear_nf4_multi_lora: a LoRA linear over NF4 in which each row of the batch names its own adapter.

    y[m] = W x[m] + bias + scalings[e] * B_e A_e dropout(x[m])      with e = adapter[m];   no low-rank part where e = -1

Ops: qlora_kernels::linear_nf4_multi_lora (differentiable in x, bias, lora_A, lora_B) and
qlora_kernels::linear_nf4_multi_lora_backward.

Kernel contract: _lora_op.py's, with lora: MultiLoRA, E >= 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..format.quant_state import QuantState
from ._checks import check_multi_lora
from ._lora_op import define_lora_op
from ._operands import MultiLoRA, weight_of
from .linear_nf4_lora import seed_for

define_lora_op("linear_nf4_multi_lora", MultiLoRA, check_multi_lora)


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
    """y[m] = W x[m] + bias + scalings[e] * B_e A_e dropout(x[m]) with e = adapter[m], forward and backward.

    x: [..., K], fp32, bf16 or fp16.   packed, state: from `quantize_nf4`, of a weight [N, K].
    lora_A: [E, r, K], lora_B: [E, N, r]; adapters of smaller rank are padded with zeros.   scalings: fp32 [E].
    adapter: int64, one per row of x, 0..E-1, or -1 for the base alone.   bias: [N] or None.
    dropout_p, seed: as linear_nf4_lora.
    Returns y [..., N] of x.dtype. Differentiable in x, bias, lora_A and lora_B.
    Raises ValueError or TypeError, naming the argument.
    """
    weight = weight_of("linear_nf4_multi_lora", packed, state)
    lora = MultiLoRA(lora_A, lora_B, scalings, adapter, seed_for(dropout_p, x.device, seed), dropout_p)
    y: Tensor = torch.ops.qlora_kernels.linear_nf4_multi_lora(x, *weight, bias, *lora)[0]
    return y
