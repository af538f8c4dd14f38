"""linear_nf4_lora and its backward by the kernels of lora_down.py, linear_nf4.py, lora_up.py and lora_grads.py.

forward    s = dropout(x) A^T  (lora_down, one pass over x);  y = x W^T + bias + scaling * s B^T  (linear_nf4)
backward   ds, grad_B from one pass over grad_y;  grad_A from one pass over x;
           grad_x = grad_y W + keep * scale * (ds A)  (linear_nf4)
Where the weight is decoded first, the product may run over K + r instead (linear_nf4_lora_group.py, for one linear).
Where the weight is not decoded first, all launches of a call are one LaunchSequence.
The dropout mask is computed from the seed where it is needed; only x and s are saved for backward.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...ops.extended_k import group_of_one
from ...ops.operands import LoRA, Needs, Weight
from .constants import absmax_pointers
from .dropout import dropout_of, rate_of
from .launch import KEPT_LAUNCHES
from .launch_sequence import LaunchSequence
from .linear_nf4 import (
    LowRankTerm,
    Product,
    add_backward,
    add_forward,
    added_outside,
    backward,
    forward,
    packed_for,
    product_of,
)
from .linear_nf4_lora_group import linear_nf4_lora_group, linear_nf4_lora_group_backward
from .lora_down import add_lora_down, lora_down
from .lora_grads import add_lora_ds_grad_B, add_lora_grad_A, lora_ds_grad_B, lora_grad_A
from .planner import Plan


def linear_nf4_lora(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> tuple[Tensor, Tensor]:
    """Return (y, s). See ops/linear_nf4_lora.py for the contract."""
    A, B, seed, scaling, dropout_p = lora
    product = product_of("linear_nf4", x, weight, A.size(0), scaling)
    chosen, sequence = _forward(product, bias is not None, 0.0 if seed is None else dropout_p)
    if sequence is not None:
        packed, constants = packed_for(chosen, weight), absmax_pointers(weight)
        y, s = sequence(x, packed, *constants, x if bias is None else bias, A, B, x if seed is None else seed)
        return y, s
    dropout = dropout_of(seed, dropout_p, x)
    if not added_outside("linear_nf4_lora", x, [weight], dropout):
        (y,), s = linear_nf4_lora_group(x, [weight], [bias], group_of_one(lora))
        return y, s
    s = lora_down(x, A, dropout)
    return forward(x, weight, bias, LowRankTerm(s, B, scaling)), s


@lru_cache(maxsize=KEPT_LAUNCHES)
def _forward(product: Product, has_bias: bool, dropout_p: float) -> tuple[Plan, LaunchSequence | None]:
    """Return the plan, and unless it decodes first, the launches of (x, packed, four pointers to constants, bias,
    lora_A, lora_B, seed), which return y and s.
    """
    chosen = product.plan("linear_nf4")
    if chosen.path == "decode":
        return chosen, None
    sequence = LaunchSequence(inputs=10, typed=slice(6, 9))  # bias and factors; the product decides about the others
    M, _, K, r, dtype, *_ = product
    assert r is not None
    s = add_lora_down(sequence, 0, 7, 9, None, (M, K, r), dtype, product.capability, rate_of(dropout_p))
    y = add_forward(sequence, range(6), 6 if has_bias else None, (s, 8), chosen, product)
    sequence.returns(y, s)
    return chosen, sequence


def linear_nf4_lora_backward(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Weight,
    lora: LoRA,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x, grad_A, grad_B), empty where not needed. See ops/linear_nf4_lora.py for the contract."""
    A, B, seed, scaling, dropout_p = lora
    need_grad_x, need_grad_A, need_grad_B = needs
    if need_grad_x:
        product = product_of("linear_nf4_grad_x", grad_y, weight, A.size(0), scaling)
        sequence = _backward(product, A.dtype, B.dtype, 0.0 if seed is None else dropout_p, needs)
        if sequence is not None:
            constants = absmax_pointers(weight)
            results = sequence(grad_y, weight.packed, *constants, x, s, A, B, x if seed is None else seed)
            grad_x = results[0]
            grad_A = results[1] if need_grad_A else A.new_empty(0)
            return grad_x, grad_A, results[-1] if need_grad_B else B.new_empty(0)
    dropout = dropout_of(seed, dropout_p, x)
    if need_grad_x and not added_outside("linear_nf4_lora_backward", x, [weight], dropout):
        grad_x, grad_A, (grad_B,) = linear_nf4_lora_group_backward([grad_y], x, s, [weight], group_of_one(lora), needs)
        return grad_x, grad_A, grad_B
    ds, grad_B = lora_ds_grad_B(grad_y, s, B, scaling, needs)
    grad_A = lora_grad_A(x, ds, dropout, A.dtype) if need_grad_A else A.new_empty(0)
    grad_x = x.new_empty(0)
    if need_grad_x:
        grad_x = backward(grad_y, weight, LowRankTerm(ds, A, dropout.rate.scale), dropout)
    return grad_x, grad_A, grad_B


@lru_cache(maxsize=KEPT_LAUNCHES)
def _backward(
    product: Product, dtype_A: torch.dtype, dtype_B: torch.dtype, dropout_p: float, needs: Needs
) -> LaunchSequence | None:
    """Return the launches of (grad_y, packed, four pointers to constants, x, s, lora_A, lora_B, seed), or None where
    the plan decodes first. They return grad_x, which must be needed, grad_A and grad_B as far as they are needed.
    """
    chosen = product.plan("linear_nf4_grad_x")
    if chosen.path == "decode":
        return None
    sequence = LaunchSequence(inputs=11, typed=slice(0))  # the arguments decide about all dtypes
    M, N, K, r, dtype, *_ = product
    capability, rate = product.capability, rate_of(dropout_p)
    assert r is not None
    x, s, lora_A, lora_B, seed = range(6, 11)
    sizes, dtypes = (M, N, r), (dtype, dtype_B)
    ds, grad_B = add_lora_ds_grad_B(sequence, 0, s, lora_B, None, sizes, dtypes, capability, product.scaling, needs)
    assert ds is not None
    grad_A = None
    if needs.need_grad_A:
        grad_A = add_lora_grad_A(sequence, x, ds, seed, (M, K, r), (dtype, dtype_A), capability, rate)
    of_grad_x = product._replace(scaling=rate.scale)
    grad_x = add_backward(sequence, range(6), (ds, lora_A), seed, chosen, of_grad_x, rate)
    sequence.returns(*(slot for slot in (grad_x, grad_A, grad_B) if slot is not None))
    return sequence
