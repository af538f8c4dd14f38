"""The linear ops over the kernels that routing.py chooses, and over torch's own matmul.

Where the weight is decoded first, the product may run over K + r (ops/extended_k.py). Dropout is a pass of its own
(dropout.cu) over x for grad_A and over ds A for grad_x; s draws the mask where it reads x (lora_down.cu).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...ops import extended_k
from ...ops.composed_lora_group import split_by_rank
from ...ops.operands import GroupLoRA, LoRA, Needs, Weight
from ...ops.registry import KernelPlan, Problem
from . import torch_products
from .codec import dequantize_nf4
from .lora_down import aligned, dropout, dropped, drops, lora_down, project
from .routing import BOUNDS, DECODE, GEMM, PAIRS, SMALL_M, WGMMA, addition_reason, lora_plan, route

_C = torch.ops.qlora_kernels_C


def plan(problem: Problem) -> KernelPlan:
    """Return the kernel of a product on the current GPU, which is the same with and without LoRA."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return lora_plan(problem, _capability(device))


def linear_nf4(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return y [M, N] = x W^T + bias."""
    return _forward(x, weight, bias, None, None)


def linear_nf4_grad_x(grad_y: Tensor, weight: Weight) -> Tensor:
    """Return grad_x [M, K] = grad_y W."""
    return _grad_x(grad_y, weight, None, None)


def linear_nf4_lora(x: Tensor, weight: Weight, bias: Tensor | None, lora: LoRA) -> tuple[Tensor, Tensor]:
    """Return (y [M, N], s [M, r])."""
    if _addition_reason("linear_nf4_lora", x, [weight], lora) is None:
        (y,), s = _extended(x, [weight], [bias], extended_k.group_of_one(lora))
        return y, s
    s = lora_down(x, lora)
    return _forward(x, weight, bias, s, lora), s


def linear_nf4_lora_backward(
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Weight,
    lora: LoRA,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x [M, K], grad_A, grad_B), empty where not needed."""
    if needs.need_grad_x and _addition_reason("linear_nf4_lora_backward", x, [weight], lora) is None:
        group = extended_k.group_of_one(lora)
        grad_x, grad_A, (grad_B,) = linear_nf4_lora_group_backward([grad_y], x, s, [weight], group, needs)
        return grad_x, grad_A, grad_B
    ds = torch_products.scaled(grad_y, lora.B.to(x.dtype), lora.scaling) if needs.need_ds else x.new_empty(0)
    grad_B = torch_products.in_fp32(grad_y.T, s).mul_(lora.scaling) if needs.need_grad_B else x.new_empty(0)
    grad_A = torch_products.in_fp32(ds.T, dropped(x, lora)) if needs.need_grad_A else x.new_empty(0)
    grad_x = _lora_grad_x(grad_y, weight, ds, lora) if needs.need_grad_x else x.new_empty(0)
    return grad_x, grad_A.to(lora.A.dtype), grad_B.to(lora.B.dtype)


def linear_nf4_lora_group(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], lora: GroupLoRA
) -> tuple[list[Tensor], Tensor]:
    """Return ([y_i [M, N_i]], s [M, sum of r_i]), with one product of x and all adapters."""
    if _addition_reason("linear_nf4_lora_group", x, weights, lora) is None:
        return _extended(x, weights, biases, lora)
    s = lora_down(x, lora)
    members = zip(weights, biases, split_by_rank(s, lora), lora.split_per_linear(), strict=True)
    return [_forward(x, weight, bias, part, member) for weight, bias, part, member in members], s


def linear_nf4_lora_group_backward(
    grad_ys: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    weights: Sequence[Weight],
    lora: GroupLoRA,
    needs: Needs,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return (grad_x [M, K], grad_A, grads of B), empty where not needed; grad_x is one product or summed in place."""
    extends = needs.need_grad_x and _addition_reason("linear_nf4_lora_group_backward", x, weights, lora) is None
    inside = extends and not drops(lora)
    both = extended_k.operand(x, sum(weight.N for weight in weights), lora.r if inside else 0) if extends else None
    parts_of_ds, grads_B, column = [], [], 0
    for grad_y, part, B, scaling in zip(grad_ys, split_by_rank(s, lora), lora.B, lora.scalings, strict=True):
        if both is None:
            if needs.need_ds:
                parts_of_ds.append(torch_products.scaled(grad_y, B.to(x.dtype), scaling))
        else:
            copy = both[:, column : column + grad_y.shape[1]]
            parts_of_ds.append(project(grad_y, B.to(x.dtype).T, scaling, copy))
            column += grad_y.shape[1]
        if needs.need_grad_B:
            grads_B.append(torch_products.in_fp32(grad_y.T, part).mul_(scaling).to(B.dtype))
        else:
            grads_B.append(x.new_empty(0))
    if not needs.need_ds:
        return x.new_empty(0), x.new_empty(0), grads_B
    ds = parts_of_ds[0] if len(parts_of_ds) == 1 else torch.cat(parts_of_ds, dim=1)
    grad_A = torch_products.in_fp32(ds.T, dropped(x, lora)).to(lora.A.dtype) if needs.need_grad_A else x.new_empty(0)
    if not needs.need_grad_x:
        return x.new_empty(0), grad_A, grads_B
    if both is not None:
        grad_x = extended_k.backward(both, weights, (ds, lora.A) if inside else None, _decode)
        if not inside:
            dropout(ds @ lora.A.to(x.dtype), lora, grad_x, add=True)
        return grad_x, grad_A, grads_B
    grad_x = _lora_grad_x(grad_ys[0], weights[0], ds, lora)
    for grad_y, weight in zip(grad_ys[1:], weights[1:], strict=True):
        if not runs_decoded("linear_nf4_grad_x", grad_y, weight):
            grad_x += _grad_x(grad_y, weight, None, None)
        else:
            grad_x.addmm_(grad_y, _dequantized(weight, grad_y))
    return grad_x, grad_A, grads_B


def _extended(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], lora: GroupLoRA
) -> tuple[list[Tensor], Tensor]:
    """Return (ys, s) by products over K + r."""
    both = extended_k.operand(x, x.shape[1], max(lora.ranks))
    s = lora_down(x, lora, copy=both[:, : x.shape[1]])
    return extended_k.forward(both, s, weights, biases, lora, _decode), s


def _addition_reason(op: str, x: Tensor, weights: Sequence[Weight], lora: LoRA | GroupLoRA) -> str | None:
    """Why the low-rank terms are added outside the base products, or None."""
    return addition_reason(op, x.shape[0], weights, x.dtype, drops(lora), _capability(x.device))


def _forward(x: Tensor, weight: Weight, bias: Tensor | None, s: Tensor | None, lora: LoRA | None) -> Tensor:
    M, N = x.shape[0], weight.N
    bias = None if bias is None else bias.contiguous()
    lora_B, scaling = (None, 0.0) if lora is None else (lora.B, lora.scaling)
    kernel = route(_problem("linear_nf4", x, weight), _capability(x.device)).kernel
    if kernel == PAIRS:
        y = x.new_empty(M, N)
        constants = (None if constant is None else aligned(constant) for constant in weight.constants)
        operands = (aligned(x), aligned(weight.packed), *constants, bias)
        factors = (_padded_rank(s), None if lora_B is None else _padded_rank(lora_B.to(x.dtype)))
        _C.cuda_linear_nf4_pairs(*operands, *factors, scaling, weight.blocksize, _multiprocessors(x.device), y)
        return y
    if kernel == SMALL_M:
        y = x.new_empty(M, N)
        B = None if lora_B is None else lora_B.contiguous()
        operands = (aligned(x), aligned(weight.packed), *weight.constants, bias)
        s = None if s is None else s.contiguous()
        _C.cuda_linear_nf4_small_m(*operands, s, B, scaling, weight.blocksize, _multiprocessors(x.device), y)
        return y
    if kernel in (GEMM, WGMMA):
        lora_right = None if lora_B is None else lora_B.to(x.dtype)
        return _gemm(x, weight, bias, s, lora_right, scaling, transposed=False, by_wgmma=kernel == WGMMA)
    w = _dequantized(weight, x).T
    y = x @ w if bias is None else torch.addmm(bias.to(x.dtype), x, w)
    return y if s is None or lora_B is None else y.addmm_(s, lora_B.to(x.dtype).T, alpha=scaling)


def _lora_grad_x(grad_y: Tensor, weight: Weight, ds: Tensor, lora: LoRA | GroupLoRA) -> Tensor:
    """Return grad_y W + dropout'(ds A)."""
    A = lora.A.to(grad_y.dtype)
    if not drops(lora):
        return _grad_x(grad_y, weight, ds, A)
    grad_x = _grad_x(grad_y, weight, None, None)
    dropout(ds @ A, lora, grad_x, add=True)
    return grad_x


def _grad_x(grad_y: Tensor, weight: Weight, ds: Tensor | None, lora_A: Tensor | None) -> Tensor:
    """Return grad_y W + ds A, with lora_A in grad_y's dtype."""
    kernel = route(_problem("linear_nf4_grad_x", grad_y, weight), _capability(grad_y.device)).kernel
    if kernel != DECODE:
        lora_right = None if lora_A is None else lora_A.T
        return _gemm(grad_y, weight, None, ds, lora_right, 1.0, transposed=True, by_wgmma=kernel == WGMMA)
    grad_x = grad_y @ _dequantized(weight, grad_y)
    return grad_x if ds is None or lora_A is None else grad_x.addmm_(ds, lora_A)


def runs_decoded(op: str, rows: Tensor, weight: Weight) -> bool:
    """Whether the base product `op` of these rows decodes the weight first."""
    return route(_problem(op, rows, weight), _capability(rows.device)).kernel == DECODE


def _problem(op: str, rows: Tensor, weight: Weight) -> Problem:
    sizes = (rows.shape[0], weight.N, weight.K, 0, weight.blocksize, weight.double_quant)
    return Problem(op, "cuda", rows.dtype, *sizes)


def _gemm(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_left: Tensor | None,
    lora_right: Tensor | None,
    scaling: float,
    *,
    transposed: bool,
    by_wgmma: bool = False,
) -> Tensor:
    """Return x W^T (x W if transposed) + bias + scaling * lora_left lora_right^T, with the factors in x's dtype.

    by_wgmma: by linear_nf4_wgmma.cu instead of linear_nf4_gemm.cu.
    """
    M, gemm_k = x.shape
    gemm_n = weight.K if transposed else weight.N
    y = x.new_empty(M, gemm_n)
    count_splits = _C.cuda_linear_nf4_wgmma_splits if by_wgmma else _C.cuda_linear_nf4_gemm_splits
    splits = count_splits(M, gemm_n, gemm_k, _multiprocessors(x.device))
    partial = x.new_empty(splits, M, gemm_n, dtype=torch.float32) if splits > 1 else None
    lora = (_padded_rank(lora_left), _padded_rank(lora_right))
    operands = (aligned(x), aligned(weight.packed), *weight.constants, bias)
    product = _C.cuda_linear_nf4_wgmma if by_wgmma else _C.cuda_linear_nf4_gemm
    product(*operands, *lora, scaling, weight.blocksize, transposed, partial, y)
    return y


def _decode(weight: Weight, out: Tensor) -> None:
    dequantize_nf4(weight, out=out)


def _dequantized(weight: Weight, like: Tensor) -> Tensor:
    """Return W [N, K] in a scratch tensor, which torch's allocator reuses for the next layer."""
    w = like.new_empty(weight.N, weight.K)
    dequantize_nf4(weight, out=w)
    return w


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def _capability_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _capability(device: torch.device) -> int:
    """Return the compute capability, 90 for 9.0; without a GPU the lowest one of the table, for `info --plan`."""
    return _capability_of(device) if device.type == "cuda" else min(BOUNDS)


def _padded_rank(factor: Tensor | None) -> Tensor | None:
    """Return a LoRA factor [rows, r] with r padded to a multiple of 8, so that rows are whole 16-byte chunks."""
    if factor is None:
        return None
    missing = -factor.shape[1] % 8
    return aligned(torch.nn.functional.pad(factor, (0, missing)) if missing else factor.contiguous())
