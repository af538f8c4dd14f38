"""attention and its gradients composed of torch's ops, over whole score matrices."""

from __future__ import annotations

from torch import Tensor

from ...ops.attention import Keys, attention_backward_by_torch, attention_by_torch


def attention(q: Tensor, k: Tensor, v: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Return out and log_sums of attention over key ranges."""
    return attention_by_torch(q, k, v, keys)


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, keys: Keys
) -> tuple[Tensor, Tensor, Tensor]:
    """Return grad_q, grad_k and grad_v for grad_out."""
    return attention_backward_by_torch(grad_out, q, k, v, keys)
