"""rope: rotary position embedding of queries and keys in one call.

Op: qlora_kernels::rope, differentiable in q and k. x = [a, b] are the two halves of a head, and cos = [cos_a, cos_b]
and sin = [sin_a, sin_b]:

    out = [a * cos_a - b * sin_a, b * cos_b + a * sin_b]            inverse = False
    out = [a * cos_a + b * sin_b, b * cos_b - a * sin_a]            inverse = True: the transpose, which is the gradient

in fp32, rounded once. It equals q * cos + rotate_half(q) * sin of transformers' models, for any cos and sin.

Kernel contract: q [B, H, T, D] and k [B, KV, T, D], the last dimension of either contiguous and all others of any
stride; cos and sin [B or 1, T, D] contiguous; all sizes >= 1, D even, one dtype.
    rope   run(q, k, cos, sin, inverse) -> (rotated q, rotated k), laid out as torch.empty_like lays them out
Source: RoFormer (arXiv:2104.09864) section 3.2.2, in the half-split layout of GPT-NeoX and Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import compose
from ._implement import differentiate, fake, implement
from .checks import check_float
from .registry import Problem, select
from .tensor_memory import contiguous

torch.library.define(
    "qlora_kernels::rope", "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)"
)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the heads of q and k by the angles of their positions.

    q: [B, H, T, D], k: [B, KV, T, D], fp32, bf16 or fp16, any strides; D even.
    cos, sin: [B, T, D], or [1, T, D] for all rows alike, of q's dtype; constants.
    Returns (q, k) rotated, with the memory layout of q and k. Differentiable in q and k.
    Raises ValueError or TypeError, naming the argument. Partial rotary embedding, where cos has fewer columns than a
    head, is refused: rotate the slice q[..., :n] and join it with the rest.
    """
    rotated: tuple[Tensor, Tensor] = torch.ops.qlora_kernels.rope.default(q, k, cos, sin, False)
    return rotated


@implement("qlora_kernels::rope")
def rope_impl(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Check the arguments, then run the selected kernel."""
    _check(q, k, cos, sin)
    if q.numel() == 0 or k.numel() == 0:
        return compose.rope(q, k, cos, sin, inverse)
    run = select(Problem("rope", q.device.type, q.dtype)).run
    rotated: tuple[Tensor, Tensor] = run(
        _with_dense_heads(q), _with_dense_heads(k), contiguous("rope", cos), contiguous("rope", sin), inverse
    )
    return rotated


@fake("qlora_kernels::rope")
def rope_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return empty tensors with the shapes, dtypes and strides of the results."""
    _check(q, k, cos, sin)
    return torch.empty_like(_with_dense_heads(q)), torch.empty_like(_with_dense_heads(k))


def _with_dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else contiguous("rope", x)


class RopeFunction(torch.autograd.Function):
    """The rotation of q and k; the gradients are rotated back by the inverse."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, run: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """Return q and k rotated."""
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        rotated: tuple[Tensor, Tensor] = run(q, k, cos, sin, inverse)
        return rotated

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """Return the gradients of (q, k, cos, sin, inverse, run)."""
        q, k = torch.ops.qlora_kernels.rope.default(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse)
        return q, k, None, None, None, None


def rope_composed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Check the arguments, then compose rope of torch's ops."""
    _check(q, k, cos, sin)
    return compose.rope(q, k, cos, sin, inverse)


differentiate("qlora_kernels::rope", (), RopeFunction.apply, compose=rope_composed, constants=("cos", "sin"))


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    op = "rope"
    check_float(op, "q", q)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must have shape [B, heads, T, D], got {tuple(x.shape)}")
    B, _, T, D = q.shape
    if (k.shape[0], k.shape[2], k.shape[3]) != (B, T, D):
        raise ValueError(f"{op}: k must have shape [B={B}, heads, T={T}, D={D}], got {tuple(k.shape)}")
    if D % 2:
        raise ValueError(f"{op}: D must be even, got {D}")
    for name, x in (("k", k), ("cos", cos), ("sin", sin)):
        if x.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{op}: {name} must be on {q.device}, got {x.device}")
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dim() == 3 and x.shape[-1] < D:
            raise ValueError(
                f"{op}: {name} must have D={D} columns, got {x.shape[-1]}; partial rotary embedding is not supported, "
                "rotate a slice of q and k"
            )
        if x.dim() != 3 or x.shape[0] not in (1, B) or tuple(x.shape[1:]) != (T, D):
            raise ValueError(f"{op}: {name} must have shape [B={B} or 1, T={T}, D={D}], got {tuple(x.shape)}")
    if cos.shape != sin.shape:
        raise ValueError(f"{op}: sin must have the shape of cos, {tuple(cos.shape)}, got {tuple(sin.shape)}")
