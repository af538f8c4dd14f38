"""attention: softmax(scale q k^T) v over a range of keys for each query, for training.

Ops: qlora_kernels::attention (differentiable in q, k and v) and qlora_kernels::attention_backward.

A query (b, t) attends to the keys [starts[b, t], ends[b, t]). Causal attention, sliding windows, left and right
padding, packed documents and prefixes are such ranges; masks with gaps are not supported. Query head h reads key head h
// (H // KV) without a repeated copy. Scores are z = softcap(scale * q . k), softcap(z) = cap * tanh(z / cap).

Kernel contract: q [B, H, Tq, D], k and v [B, KV, Tk, D] of one dtype, the last dimension contiguous and the others of
any stride; starts and ends int64 [B, Tq] contiguous, within [0, Tk]; all sizes >= 1, H a multiple of KV.
    attention           run(q, k, v, keys) -> (out [B, Tq, H, D] contiguous, log_sums fp32 [B, H, Tq])
    attention_backward  run(grad_out, q, k, v, out, log_sums, keys)
                        -> (grad_q [B, Tq, H, D], grad_k, grad_v [B, Tk, KV, D])
keys: Keys. log_sums is the log of the sum of exp(z), from which the backward pass recomputes the probabilities; a query
without keys has zeros in out and log_sums. Scores, softmax and sums are fp32. Probabilities and the gradients of scores
may be rounded to q's dtype before they are multiplied, and results are rounded once.
Sources: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2; softcap: Gemma 2 (arXiv:2408.00118).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._implement import compose_derivatives, differentiate, fake, implement
from .checks import check_float, check_given
from .registry import Problem, device_type, select
from .tensor_memory import check_memory, contiguous

OP = "attention"


class Keys(NamedTuple):
    """The keys that each query attends to, and the parameters of scores. starts, ends: int64 [B, Tq]. softcap: 0 for
    none.
    """

    starts: Tensor
    ends: Tensor
    scale: float
    softcap: float


_FORWARD = (Tensor, Tensor, Tensor, Keys)
_BACKWARD = (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Keys)
_KEYS = "Tensor starts, Tensor ends, float scale, float softcap"
torch.library.define("qlora_kernels::attention", f"(Tensor q, Tensor k, Tensor v, {_KEYS}) -> (Tensor, Tensor)")
torch.library.define(
    "qlora_kernels::attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums, {_KEYS})"
    " -> (Tensor, Tensor, Tensor)",
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
    key_ranges: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute attention with grouped heads; a query attends to the keys that satisfy all conditions below.

    q: [B, H, Tq, D], k and v: [B, KV, Tk, D], fp32, bf16 or fp16, any strides; H a multiple of KV.
    causal: keys up to the query's own position; needs Tq == Tk.   window: of the causal keys, only the last `window`.
    documents: int64 [B, Tq], needs Tq == Tk; a query attends to the run of equal numbers around its position.
    key_ranges: int64 (starts, ends), each [B, Tq] within [0, Tk]: keys [starts, ends).
    scale: of the scores, by default D ** -0.5.   softcap: bounds them, cap * tanh(z / cap); None for no bound.
    dropout_p: must be 0; dropout of probabilities is not implemented.
    Returns [B, H, Tq, D] of q's dtype, laid out in memory as [B, Tq, H, D]; zeros for a query without keys.
    Differentiable in q, k and v.
    Raises ValueError or TypeError, naming the argument; NotImplementedError for dropout.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_given(OP, name, tensor)
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"{OP}: dropout_p must be 0, got {dropout_p}; torch.nn.functional.scaled_dot_product_attention has dropout"
        )
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{OP}: softcap must be positive and finite, got {softcap}; pass None for no bound")
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"{OP}: q and k must have four dimensions, got shapes {tuple(q.shape)} and {tuple(k.shape)}")
    starts, ends = _key_ranges(q, k, causal, window, documents, key_ranges)
    keys = Keys(starts, ends, q.shape[-1] ** -0.5 if scale is None else float(scale), float(softcap or 0.0))
    out, _ = torch.ops.qlora_kernels.attention.default(q, k, v, *keys)
    heads_first: Tensor = out.transpose(1, 2)
    return heads_first


@implement("qlora_kernels::attention", _FORWARD)
def attention_impl(q: Tensor, k: Tensor, v: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Check the arguments, then run the selected kernel."""
    _check(OP, q, k, v, keys)
    check_memory(OP, (q, k, v, *keys))
    _check_ranges(OP, keys, k.shape[2])
    if q.numel() == 0 or k.numel() == 0:
        return _outputs(q, torch.Tensor.new_zeros)
    run = select(_problem(OP, q, k)).run
    out, log_sums = run(*_heads(q, k, v), _contiguous(keys))
    return out, log_sums


@fake("qlora_kernels::attention", _FORWARD)
def attention_fake(q: Tensor, k: Tensor, v: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Return empty tensors with the shapes and dtypes of (out, log_sums)."""
    _check(OP, q, k, v, keys)
    return _outputs(q, torch.Tensor.new_empty)


@implement("qlora_kernels::attention_backward", _BACKWARD)
def attention_backward_impl(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, keys: Keys
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments, then run the selected kernel."""
    op = "attention_backward"
    _check_backward(grad_out, q, k, v, out, log_sums, keys)
    check_memory(op, (grad_out, q, k, v, out, log_sums, *keys))
    _check_ranges(op, keys, k.shape[2])
    if q.numel() == 0 or k.numel() == 0:
        return _gradients(q, k, torch.Tensor.new_zeros)
    run = select(_problem(op, q, k)).run
    grad_q, grad_k, grad_v = run(
        contiguous(op, grad_out),
        *_heads(q, k, v),
        contiguous(op, out),
        contiguous(op, log_sums),
        _contiguous(keys),
    )
    return grad_q, grad_k, grad_v


@fake("qlora_kernels::attention_backward", _BACKWARD)
def attention_backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, keys: Keys
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors with the shapes and dtypes of the gradients."""
    _check_backward(grad_out, q, k, v, out, log_sums, keys)
    return _gradients(q, k, torch.Tensor.new_empty)


class AttentionFunction(torch.autograd.Function):
    """The out of attention and its gradients with respect to q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keys: Keys, run: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """Return (out, log_sums); log_sums has no gradient."""
        out, log_sums = run(q, k, v, *keys)
        ctx.mark_non_differentiable(log_sums)
        ctx.save_for_backward(q, k, v, out, log_sums, keys.starts, keys.ends)
        ctx.scale, ctx.softcap = keys.scale, keys.softcap
        return out, log_sums

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of (q, k, v, keys, run)."""
        gradients = torch.ops.qlora_kernels.attention_backward.default(
            grad_out, *ctx.saved_tensors, ctx.scale, ctx.softcap
        )
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return *(grad.transpose(1, 2) if needed else None for grad, needed in wanted), None, None


def attention_by_torch(q: Tensor, k: Tensor, v: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Compose (out, log_sums) of torch's differentiable ops, over whole score matrices; log_sums is detached."""
    z, _, p = _probabilities(q, k, keys)
    out = (p @ _grouped(v, k)).to(q.dtype)
    sees = (keys.starts < keys.ends)[:, None, :]
    log_sums = z.detach().logsumexp(dim=-1).view(q.shape[:3])
    return out.reshape(q.shape).transpose(1, 2).contiguous(), torch.where(sees, log_sums, 0.0)


def attention_backward_by_torch(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, keys: Keys
) -> tuple[Tensor, Tensor, Tensor]:
    """Compose (grad_q, grad_k, grad_v) of torch's differentiable ops; the probabilities are computed from q and k."""
    _, slope, p = _probabilities(q, k, keys)
    grad = _grouped(grad_out.transpose(1, 2), k)
    grad_p = grad @ _grouped(v, k).transpose(-1, -2)
    grad_z = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * keys.scale
    grad_z = grad_z if slope is None else grad_z * slope
    grad_q = (grad_z @ _grouped(k, k)).reshape(q.shape)
    grad_k = (grad_z.transpose(-1, -2) @ _grouped(q, k)).sum(2)
    grad_v = (p.transpose(-1, -2) @ grad).sum(2)
    results = [grad.to(q.dtype).transpose(1, 2).contiguous() for grad in (grad_q, grad_k, grad_v)]
    return results[0], results[1], results[2]


def attention_composed(q: Tensor, k: Tensor, v: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Check the arguments, then compose attention of torch's ops."""
    _check(OP, q, k, v, keys)
    return attention_by_torch(q, k, v, keys)


def attention_backward_composed(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, keys: Keys
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments, then compose attention_backward of torch's ops; out and log_sums are recomputed."""
    _check_backward(grad_out, q, k, v, out, log_sums, keys)
    return attention_backward_by_torch(grad_out, q, k, v, keys)


differentiate("qlora_kernels::attention", _FORWARD, AttentionFunction.apply, compose=attention_composed, constants=())
compose_derivatives("qlora_kernels::attention_backward", _BACKWARD, attention_backward_composed)


def _grouped(heads: Tensor, k: Tensor) -> Tensor:
    """Return [B, H or KV, T, D] in fp32 as [B, KV, group or 1, T, D]."""
    return heads.float().reshape(heads.shape[0], k.shape[1], -1, *heads.shape[2:])


def _probabilities(q: Tensor, k: Tensor, keys: Keys) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (z, its derivative with respect to the score before softcap or None, p), each [B, KV, group, Tq, Tk]."""
    z, slope = keys.scale * (_grouped(q, k) @ _grouped(k, k).transpose(-1, -2)), None
    if keys.softcap:
        t = torch.tanh(z / keys.softcap)
        z, slope = keys.softcap * t, 1 - t * t
    place = torch.arange(k.shape[2], device=k.device)
    visible = (place >= keys.starts[..., None]) & (place < keys.ends[..., None])
    visible = visible[:, None, None]
    # A softmax over no keys and its gradient would be NaN.
    z = z.masked_fill(~visible & visible.any(-1, keepdim=True), -float("inf"))
    return z, slope, torch.softmax(z, dim=-1) * visible


def _key_ranges(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: int | None,
    documents: Tensor | None,
    key_ranges: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return (starts, ends), int64 [B, Tq]: the intersection of all conditions."""
    B, Tq, Tk = q.shape[0], q.shape[2], k.shape[2]
    if (causal or documents is not None) and Tq != Tk:
        raise ValueError(
            f"{OP}: causal and documents need as many queries as keys, got Tq={Tq} and Tk={Tk}; "
            f"pass causal=False and key_ranges"
        )
    if window is not None and (not causal or window < 1):
        raise ValueError(f"{OP}: window must be at least 1 and causal True, got window={window}, causal={causal}")
    if key_ranges is None:
        starts = torch.zeros(B, Tq, dtype=torch.int64, device=q.device)
        ends = torch.full_like(starts, Tk)
    else:
        starts, ends = key_ranges
        for name, tensor in (("starts", starts), ("ends", ends)):
            _check_range_tensor(OP, f"key_ranges: {name}", tensor, (B, Tq), q.device)
    place = torch.arange(Tq, device=q.device)
    if causal:
        ends = torch.minimum(ends, place + 1)
        starts = starts if window is None else torch.maximum(starts, place + 1 - window)
    if documents is not None:
        _check_range_tensor(OP, "documents", documents, (B, Tq), q.device)
        first = torch.ones_like(documents, dtype=torch.bool)
        first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = torch.maximum(starts, torch.where(first, place, 0).cummax(1).values)
        last = torch.ones_like(first)
        last[:, :-1] = first[:, 1:]
        after = torch.where(last, place + 1, Tk).flip(1).cummin(1).values.flip(1)
        ends = torch.minimum(ends, after)
    return starts, ends


def _outputs(q: Tensor, new: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    B, H, Tq, D = q.shape
    return new(q, (B, Tq, H, D)), new(q, (B, H, Tq), dtype=torch.float32)


def _gradients(q: Tensor, k: Tensor, new: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    B, H, Tq, D = q.shape
    KV, Tk = k.shape[1:3]
    return new(q, (B, Tq, H, D)), new(k, (B, Tk, KV, D)), new(k, (B, Tk, KV, D))


def _problem(op: str, q: Tensor, k: Tensor) -> Problem:
    return Problem(op, device_type(q), q.dtype, q.shape[2], k.shape[2], q.shape[3])


def _heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors)


def _contiguous(keys: Keys) -> Keys:
    return keys._replace(starts=contiguous(OP, keys.starts), ends=contiguous(OP, keys.ends))


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, keys: Keys) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must have four dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{op}: {name} must be on {q.device}, got {tensor.device}")
    if v.shape != k.shape:
        raise ValueError(f"{op}: v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"{op}: k must have q's batch size and head dimension, {q.shape[0]} and {q.shape[3]}, got {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: q must have a multiple of k's {k.shape[1]} heads, got {q.shape[1]}")
    for name, tensor in (("starts", keys.starts), ("ends", keys.ends)):
        _check_range_tensor(op, name, tensor, (q.shape[0], q.shape[2]), q.device)
    if not math.isfinite(keys.scale) or not math.isfinite(keys.softcap) or keys.softcap < 0:
        got = f"{keys.scale} and {keys.softcap}"
        raise ValueError(f"{op}: scale and softcap must be finite, and softcap not negative, got {got}")


def _check_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, keys: Keys
) -> None:
    op = "attention_backward"
    _check(op, q, k, v, keys)
    B, H, Tq, D = q.shape
    expected = (
        ("grad_out", grad_out, (B, Tq, H, D), q.dtype),
        ("out", out, (B, Tq, H, D), q.dtype),
        ("log_sums", log_sums, (B, H, Tq), torch.float32),
    )
    for name, tensor, shape, dtype in expected:
        check_given(op, name, tensor)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != q.device:
            got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{op}: {name} must be {dtype} {shape} on {q.device}, got {got}")


def _check_range_tensor(op: str, name: str, tensor: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    check_given(op, name, tensor)
    if tensor.dtype != torch.int64 or tuple(tensor.shape) != shape or tensor.device != device:
        got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{op}: {name} must be int64 {shape} on {device}, got {got}")


def _check_ranges(op: str, keys: Keys, length: int) -> None:
    """Raise unless starts and ends lie within the keys; skipped on a GPU, where the test would synchronize."""
    if not keys.starts.is_cpu or keys.starts.numel() == 0:
        return
    lowest, highest = int(keys.starts.min()), int(keys.ends.max())
    if lowest < 0 or highest > length:
        raise ValueError(f"{op}: starts and ends must lie in [0, Tk={length}], got {lowest} and {highest}")
