"""linear_cross_entropy: the loss of an output head and its gradient, without the logits of all tokens in memory.

Op: qlora_kernels::linear_cross_entropy (differentiable in hidden, weight and bias).

With z[m] = softcap(logit_scale * (hidden[m] @ weight.T + bias)) and softcap(z) = cap * tanh(z / cap), the loss of a
token is losses[m] = log(sum_v exp(z[m, v])) - z[m, labels[m]], and 0 where labels[m] == ignore_index.

Kernel contract: hidden [M, K] and labels int64 [M] contiguous; head: Head, its weight [V, K] contiguous; M, V, K >= 1.
    run(hidden, labels, head, *, need_grad_hidden)
        -> (losses fp32 [M], log_sums fp32 [M], rows [M, K] of hidden.dtype or empty)
log_sums[m] is log(sum_v exp(z[m, v])), any finite value for ignored tokens; rows[m] is the gradient of losses[m] with
respect to hidden[m]. The weight is rounded to hidden's dtype; logits, softmax and sums are fp32, and rows is rounded
once. Probabilities, or the gradient of the logits, may be rounded to hidden's dtype before they are multiplied by the
weight. On a CPU, labels are checked before the call; on other devices a wrong label must give NaN.

The forward pass also computes the gradient of the hidden states, by a second product over each chunk of the weight. The
gradient of the weight, required only if the head is trained, is computed in the backward pass by torch's ops, over a
chunk of the vocabulary at a time. Second derivatives, forward mode and the transforms of torch.func run in torch's ops
over whole logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._implement import differentiate, fake, implement
from ._linear import matrix
from .checks import check_bias, check_float, check_given, check_last_dim
from .registry import Problem, select
from .tensor_memory import check_memory, contiguous

OP = "linear_cross_entropy"
VOCABULARY_CHUNK = 4096
"""Number of rows of the weight whose probabilities are in memory at one time for the gradient of the weight."""


class Head(NamedTuple):
    """An output head.   weight: [V, K] and bias: [V] or None, any float dtype.

    logit_scale: factor of the logits.   softcap: their bound, 0 for none.
    """

    weight: Tensor
    bias: Tensor | None
    ignore_index: int
    logit_scale: float
    softcap: float


_TAKES = (Tensor, Tensor, Head, Tensor)
torch.library.define(
    f"qlora_kernels::{OP}",
    "(Tensor hidden, Tensor labels, Tensor weight, Tensor? bias, int ignore_index, float logit_scale, float softcap, "
    "bool need_grad_hidden) -> (Tensor, Tensor, Tensor)",
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """Compute cross_entropy(hidden @ weight.T + bias, labels) without the logits in memory; labels are not shifted.

    hidden: [..., K], fp32, bf16 or fp16; under torch.autocast it is cast to the autocast dtype.
    weight: [V, K] and bias: [V], any float dtype; the weight is used in hidden's dtype.
    labels: int64 with hidden's leading dimensions, each in [0, V) or ignore_index; tokens of that label have no loss.
    logit_scale: factor of the logits.   softcap: bounds them, cap * tanh(z / cap), as in Gemma 2; None for no bound.
    reduction: "mean" over the tokens that are not ignored (NaN if there are none), "sum", or "none": a loss for each
        token.   num_items_in_batch: with "mean", the number to divide the sum by instead, as transformers passes it
        under gradient accumulation.
    Returns the loss in fp32: a scalar, or a tensor of labels' shape for "none". Differentiable in hidden, weight and
    bias.
    Raises ValueError or TypeError, naming the argument; NotImplementedError where a forced backend cannot serve.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{OP}: reduction must be "mean", "sum" or "none", got {reduction!r}')
    check_given(OP, "hidden", hidden)
    check_given(OP, "labels", labels)
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{OP}: softcap must be positive and finite, got {softcap}; pass None for no bound")
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if tuple(labels.shape) != tuple(hidden.shape[:-1]):
        raise ValueError(
            f"{OP}: labels must have the leading dimensions of hidden, {tuple(hidden.shape[:-1])}, "
            f"got shape {tuple(labels.shape)}"
        )
    need_grad_hidden = hidden.requires_grad and torch.is_grad_enabled()
    losses, _, _ = torch.ops.qlora_kernels.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        labels.reshape(-1),
        *Head(weight, bias, ignore_index, float(logit_scale), float(softcap or 0.0)),
        need_grad_hidden,
    )
    if reduction == "none":
        each: Tensor = losses.view(labels.shape)
        return each
    total: Tensor = losses.sum()
    if reduction == "sum":
        return total
    if num_items_in_batch is not None:
        count = num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)
    return total / (labels != ignore_index).sum()


@implement(f"qlora_kernels::{OP}", _TAKES)
def linear_cross_entropy_impl(
    hidden: Tensor, labels: Tensor, head: Head, need_grad_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments, then run the selected kernel."""
    _check(hidden, labels, head)
    check_memory(OP, (hidden, labels, *head))
    if labels.is_cpu:  # on a GPU the test would synchronize with the device
        _check_labels(labels, head)
    M, K = hidden.shape
    V = head.weight.shape[0]
    if M == 0 or V == 0:  # without a vocabulary every token is ignored
        return _zeros(hidden, need_grad_hidden)
    if K == 0:
        losses, log_sums = losses_and_log_sums(hidden, labels, head)
        return losses, log_sums, _zeros(hidden, need_grad_hidden)[2]
    bias = None if head.bias is None else contiguous(OP, head.bias)
    head = head._replace(weight=contiguous(OP, head.weight), bias=bias)
    problem = Problem(OP, "cpu" if hidden.is_cpu else hidden.device.type, hidden.dtype, M, V, K)
    losses, log_sums, rows = select(problem).run(
        matrix(hidden), contiguous(OP, labels), head, need_grad_hidden=need_grad_hidden
    )
    return losses, log_sums, rows


@fake(f"qlora_kernels::{OP}", _TAKES)
def linear_cross_entropy_fake(
    hidden: Tensor, labels: Tensor, head: Head, need_grad_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors with the shapes and dtypes of (losses, log_sums, rows)."""
    _check(hidden, labels, head)
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses), hidden.new_empty(hidden.shape if need_grad_hidden else (0,))


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The losses of linear_cross_entropy and their gradients with respect to hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        logit_scale: float,
        softcap: float,
        need_grad_hidden: bool,
        run: Callable[..., Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (losses, log_sums, rows); log_sums and rows have no gradient."""
        numbers = (ignore_index, logit_scale, softcap)
        losses, log_sums, rows = run(hidden, labels, weight, bias, *numbers, need_grad_hidden)
        ctx.mark_non_differentiable(log_sums, rows)
        ctx.save_for_backward(hidden, labels, weight, bias, log_sums, rows)
        ctx.numbers = numbers
        return losses, log_sums, rows

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of forward's arguments."""
        hidden, labels, weight, bias, log_sums, rows = ctx.saved_tensors
        head = Head(weight, bias, *ctx.numbers)
        need_hidden, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or (need_hidden and rows.shape != hidden.shape):
            wanted = [t for t, needed in ((hidden, need_hidden), (weight, need_weight), (bias, need_bias)) if needed]
            gradients = iter(_gradients_composed(grad_losses, hidden, labels, head, wanted))
            grad_hidden = next(gradients) if need_hidden else None
            grad_weight = next(gradients) if need_weight else None
            grad_bias = next(gradients) if need_bias else None
        else:
            grad_hidden = rows * grad_losses[:, None].to(rows.dtype) if need_hidden else None
            grad_weight = grad_bias = None
            if need_weight or need_bias:
                grad_weight, grad_bias = _gradients_of_head(grad_losses, hidden, labels, head, log_sums)
        return (
            grad_hidden,
            None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *(None,) * 5,
        )


def logits_of(hidden: Tensor, weight: Tensor, head: Head, bias: Tensor | None) -> Tensor:
    """Return z [M, V] of `weight` and `bias`, which may be some rows of the head's; fp32 for an fp32 `hidden`."""
    z = F.linear(hidden, weight)
    if bias is not None:
        z = z + bias.float()
    if head.logit_scale != 1.0:
        z = z * head.logit_scale
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


def grad_of_logits(z: Tensor, log_sums: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Return the gradient of each token's loss with respect to hidden @ weight.T + bias.

    z: [M, columns], some columns of the logits.   labels: relative to the first of these columns; a label outside them
    has no column here, and the caller must mask tokens whose label is in no column.
    """
    grad = torch.exp(z - log_sums[:, None])
    grad -= (torch.arange(z.shape[1], device=z.device) == labels[:, None]).to(grad.dtype)
    if head.softcap:
        grad *= 1.0 - (z / head.softcap).square()
    return grad * head.logit_scale


def losses_and_log_sums(hidden: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Compose (losses [M], log_sums [M]) of torch's differentiable ops over whole logits; log_sums is detached."""
    z = logits_of(hidden.float(), head.weight.to(hidden.dtype).float(), head, head.bias)
    losses = F.cross_entropy(z, labels, ignore_index=head.ignore_index, reduction="none")
    return losses, z.detach().logsumexp(dim=1)


def linear_cross_entropy_composed(
    hidden: Tensor, labels: Tensor, head: Head, need_grad_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments, then compose the op of torch's ops for derivatives of higher order; rows is left out."""
    _check(hidden, labels, head)
    return *losses_and_log_sums(hidden, labels, head), hidden.new_zeros(0)


def _apply(hidden: Tensor, labels: Tensor, head: Head, need_grad_hidden: bool, run: Callable[..., Any]) -> Any:
    return LinearCrossEntropyFunction.apply(  # type: ignore[no-untyped-call]
        hidden, labels, *head, need_grad_hidden, run
    )


differentiate(
    f"qlora_kernels::{OP}",
    _TAKES,
    _apply,
    compose=linear_cross_entropy_composed,
    constants=(),
)


def _gradients_composed(
    grad_losses: Tensor, hidden: Tensor, labels: Tensor, head: Head, wanted: list[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients of `wanted`, differentiable if grad mode is on."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        losses, _ = losses_and_log_sums(hidden, labels, head)
        return torch.autograd.grad(losses, wanted, grad_losses, create_graph=differentiable)


def _gradients_of_head(
    grad_losses: Tensor, hidden: Tensor, labels: Tensor, head: Head, log_sums: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return (grad_weight, grad_bias), computed over VOCABULARY_CHUNK rows of the weight at a time."""
    weight, bias = head.weight, head.bias
    learned = labels != head.ignore_index
    of_token = torch.where(learned, grad_losses, 0.0)[:, None]
    relative = torch.where(learned, labels, -1)
    wide = torch.where(learned[:, None], hidden, 0.0).float()
    log_sums = torch.where(learned, log_sums, 0.0)
    grad_weight, grad_bias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
    for start in range(0, weight.shape[0], VOCABULARY_CHUNK):
        chunk = slice(start, start + VOCABULARY_CHUNK)
        z = logits_of(wide, weight[chunk].to(hidden.dtype).float(), head, None if bias is None else bias[chunk])
        grad_z = grad_of_logits(z, log_sums, relative - start, head) * of_token
        grad_weight[chunk] = grad_z.T @ wide
        if grad_bias is not None:
            grad_bias[chunk] = grad_z.sum(0)
    return grad_weight, grad_bias


def _zeros(hidden: Tensor, need_grad_hidden: bool) -> tuple[Tensor, Tensor, Tensor]:
    losses = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    return losses, torch.zeros_like(losses), hidden.new_zeros(hidden.shape if need_grad_hidden else (0,))


def _check(hidden: Tensor, labels: Tensor, head: Head) -> None:
    weight = head.weight
    check_float(OP, "hidden", hidden)
    check_float(OP, "weight", weight)
    check_given(OP, "labels", labels)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dim() != 2:
            raise ValueError(f"{OP}: {name} must have two dimensions, got shape {tuple(tensor.shape)}")
    check_last_dim(OP, "hidden", hidden, weight.shape[1], "K")
    check_bias(OP, head.bias, weight.shape[0], hidden.device)
    if labels.dtype != torch.int64 or tuple(labels.shape) != (hidden.shape[0],):
        expected = f"int64 with one label for each of the {hidden.shape[0]} tokens"
        raise ValueError(f"{OP}: labels must be {expected}, got {labels.dtype} {tuple(labels.shape)}")
    for name, tensor in (("weight", weight), ("labels", labels)):
        if tensor.device != hidden.device:
            raise ValueError(f"{OP}: {name} must be on {hidden.device}, got {tensor.device}")
    if not math.isfinite(head.logit_scale) or not math.isfinite(head.softcap) or head.softcap < 0:
        got = f"{head.logit_scale} and {head.softcap}"
        raise ValueError(f"{OP}: logit_scale and softcap must be finite, and softcap not negative, got {got}")


def _check_labels(labels: Tensor, head: Head) -> None:
    V = head.weight.shape[0]
    wrong = ((labels < 0) | (labels >= V)) & (labels != head.ignore_index)
    if wrong.any():
        first = int(labels[wrong][0])
        raise ValueError(f"{OP}: labels must lie in [0, V={V}) or equal ignore_index={head.ignore_index}, got {first}")
