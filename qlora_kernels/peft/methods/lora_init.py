"""LoRA initialisations beyond random A and zero B: PiSSA, OLoRA, LoftQ and orthogonal factors.

Source: PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775), LoftQ (arXiv:2310.08659); orthogonal: PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.base_layer import dense_weight, is_quantized, quantized, with_weight
from .lora_layers import LoraLinear


def principal_factors(weight: Tensor, r: int, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """Return A [r, K], B [N, r] with B A the best rank-r approximation of weight [N, K], singular values split evenly.

    niter: power iterations of a randomised SVD; None = exact SVD.
    """
    if niter is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=r, niter=niter)
        vh = v.T
    root = s[:r].sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


@torch.no_grad()
def init_from_base(delta: LoraLinear, base: nn.Module, how: str) -> None:
    """Set scaling * B A to a rank-r part of W, and the fixed pair to the same part, which is subtracted.

    "pissa": the principal part.   "olora": B A = Q[:, :r] R[:r] of W = Q R, times scaling, as in PEFT.
    PEFT subtracts the part from the base's weight instead. The fixed pair costs r more columns in the fused call, but
    the base is unchanged, so that other adapters, disable_adapter and the saved file (a LoRA of rank 2r) refer to the
    original weight.
    Raises ValueError for "olora" with a rank above the smaller side of W.
    """
    weight = dense_weight(base)
    if how == "olora":
        q, upper = torch.linalg.qr(weight)
        if delta.r > q.shape[1]:
            raise ValueError(f"olora: r must be <= {q.shape[1]} over a weight of {list(weight.shape)}, got {delta.r}")
        lora_A, lora_B = upper[: delta.r], q[:, : delta.r]
    else:
        niter = int(how.removeprefix("pissa_niter_")) if how != "pissa" else None
        lora_A, lora_B = principal_factors(weight / delta.scaling, delta.r, niter)
    delta.lora_A.weight.copy_(lora_A)
    delta.lora_B.weight.copy_(lora_B)
    delta.fixed_A, delta.fixed_B = delta.lora_A.weight.detach().clone(), -delta.lora_B.weight.detach()


@torch.no_grad()
def init_orthogonal(delta: LoraLinear) -> None:
    """Set random A and B with B A = 0: A's columns lie in the span of one half of an orthogonal basis, B's rows in the
    other.
    """
    half, (lora_A, lora_B) = delta.r // 2, (delta.lora_A.weight, delta.lora_B.weight)
    q, _ = torch.linalg.qr(torch.randn(delta.r, delta.r))
    lora_A.copy_(q[0::2].T @ torch.randn(half, lora_A.shape[1]) / 10)
    lora_B.copy_(torch.randn(lora_B.shape[0], half) @ q[1::2] / 10)


@torch.no_grad()
def init_loftq(delta: LoraLinear, base: nn.Module, path: str, loftq_iter: int = 1, loftq_bits: int = 4) -> nn.Module:
    """Alternate Q = NF4(W - scaling * B A) and B A = SVD_r(W - Q) / scaling; return Q, which replaces the base.

    Raises ValueError if the base is already quantized, because the error against the dense weight is fitted, and
    NotImplementedError for other than 4 bits.
    """
    if is_quantized(base):
        raise ValueError(f"loftq: {path} must be a dense layer, got {type(base).__name__}; loftq quantizes it itself")
    if loftq_bits != 4:
        raise NotImplementedError(f"loftq: loftq_bits must be 4, got {loftq_bits}")
    weight = dense_weight(base)
    residual = weight
    for _ in range(loftq_iter):
        layer = quantized(with_weight(base, residual, base.bias, "16bit"))  # type: ignore[arg-type]
        lora_A, lora_B = principal_factors((weight - dense_weight(layer)) / delta.scaling, delta.r)
        residual = weight - delta.scaling * (lora_B @ lora_A)
    delta.lora_A.weight.copy_(lora_A)
    delta.lora_B.weight.copy_(lora_B)
    return layer
