"""linear_cross_entropy: the loss of an output head and its gradient, without the logits of all tokens in memory.

Op: qlora_kernels::linear_cross_entropy (differentiable in hidden, a dense weight, low_rank and bias).

With z[m] = softcap(logit_scale * (hidden[m] @ weight.T + bias)) and softcap(z) = cap * tanh(z / cap), the loss of a
token is losses[m] = log(sum_v exp(z[m, v])) - z[m, labels[m]], and 0 where labels[m] == ignore_index.

The weight is dense or in NF4. A low-rank update of the head is r more columns of hidden and of the weight
(output_head.py); weight means all columns here, and K counts them.

Kernel contract: hidden [M, K] and labels int64 [M] contiguous; head: Head, its tensors contiguous; M, V, K >= 1.
    run(hidden, labels, head, *, need_grad_hidden)
        -> (losses fp32 [M], log_sums fp32 [M], rows [M, K] of hidden.dtype or empty)
log_sums[m] is log(sum_v exp(z[m, v])), any finite value for ignored tokens; rows[m] is the gradient of losses[m] with
respect to hidden[m]. The weight is rounded to hidden's dtype; logits, softmax and sums are fp32, and rows is rounded
once. Probabilities, or the gradient of the logits, may be rounded to hidden's dtype before they are multiplied by the
weight. On a CPU, labels are checked before the call; on other devices a wrong label must give NaN.

The forward pass also computes the gradient of the hidden states, by a second product over each chunk of the weight. The
gradient of the weight, required only if the head or its adapter is trained, is computed in the backward pass by torch's
ops, over a chunk of the vocabulary at a time. Second derivatives, forward mode and the transforms of torch.func run in
torch's ops over whole logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..format.quant_state import QuantState
from ._implement import differentiate, fake, implement
from ._linear import CONSTANTS, flatten_to_2d
from .checks import check_bias, check_float, check_given, check_last_dim, check_weight
from .output_head import Head, grad_of_logits, logits_of
from .registry import Problem, device_type, select
from .tensor_memory import check_memory, contiguous

OP = "linear_cross_entropy"
VOCABULARY_CHUNK = 4096
"""Number of rows of the weight whose probabilities are in memory at one time for the gradient of the weight."""


_TAKES = (Tensor, Tensor, Head, Tensor)
torch.library.define(
    f"qlora_kernels::{OP}",
    f"(Tensor hidden, Tensor labels, {Head.schema()}, bool need_grad_hidden) -> (Tensor, Tensor, Tensor)",
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    state: QuantState | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """Compute cross_entropy(hidden @ weight.T + bias, labels) without the logits in memory; labels are not shifted.

    hidden: [..., K], fp32, bf16 or fp16; under torch.autocast it is cast to the autocast dtype.
    weight: [V, K] and bias: [V], any float dtype; the weight is used in hidden's dtype.
    state: for a weight in NF4, which is a constant: `weight` is then `packed`, both from `quantize_nf4`.
    lora_A: [r, K] and lora_B: [V, r], any float dtype, add scaling * lora_B @ lora_A to the weight; None for no update.
    labels: int64 with hidden's leading dimensions, each in [0, V) or ignore_index; tokens of that label have no loss.
    logit_scale: factor of the logits.   softcap: bounds them, cap * tanh(z / cap), as in Gemma 2; None for no bound.
    reduction: "mean" over the tokens that are not ignored (NaN if there are none), "sum", or "none": a loss for each
        token.   num_items_in_batch: with "mean", the number to divide the sum by instead, as transformers passes it
        under gradient accumulation.
    Returns the loss in fp32: a scalar, or for "none" of labels' shape. Differentiable in hidden, weight, bias, lora_A
    and lora_B.
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
    hidden = hidden.reshape(-1, hidden.shape[-1])
    head = Head(weight, bias, ignore_index, float(logit_scale), float(softcap or 0.0))
    if state is not None:
        head = head._replace(**nf4_fields(state))
    if lora_A is not None or lora_B is not None:
        hidden, low_rank = with_low_rank(hidden, head.V, lora_A, lora_B, scaling)
        head = head._replace(low_rank=low_rank)
    need_grad_hidden = hidden.requires_grad and torch.is_grad_enabled()
    losses, _, _ = torch.ops.qlora_kernels.linear_cross_entropy.default(
        hidden, labels.reshape(-1), *head, need_grad_hidden
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


def nf4_fields(state: QuantState) -> dict[str, Any]:
    """Return the fields of a Head with an NF4 weight, from the state of its packed bytes.

    Raises ValueError if the weight is not a matrix.
    """
    if len(state.shape) != 2:
        raise ValueError(f"{OP}: state must describe a two-dimensional weight, got shape {tuple(state.shape)}")
    names = ("absmax", "absmax_q", "absmax_scale", "absmax_offset")
    constants = dict(zip(names, state.constants, strict=True))
    out_features, in_features = state.shape
    return {**constants, "blocksize": state.blocksize, "out_features": out_features, "in_features": in_features}


def with_low_rank(
    hidden: Tensor, V: int, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return (hidden [M, K + r] with the columns of an update, columns [V, r] of the weight), differentiable.

    The values of lora_A are rounded to hidden's dtype, as in a LoRA linear. Its gradient is not: the product is
    computed on fp32 operands, and the rounding is a constant that autograd does not see.
    Raises ValueError if only one factor is given or their shapes do not fit, and TypeError if one is not a float
    tensor.
    """
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if factor is None:
            raise ValueError(f"{OP}: lora_A and lora_B must be given together, got no {name}")
        check_float(OP, name, factor)
    assert lora_A is not None
    assert lora_B is not None
    if lora_A.dim() != 2 or lora_A.shape[0] < 1 or lora_A.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{OP}: lora_A must have shape [r, K={hidden.shape[-1]}], got {tuple(lora_A.shape)}")
    if tuple(lora_B.shape) != (V, lora_A.shape[0]):
        raise ValueError(f"{OP}: lora_B must have shape [V={V}, r={lora_A.shape[0]}], got {tuple(lora_B.shape)}")
    A = lora_A.float()
    used = A + (lora_A.detach().to(hidden.dtype).float() - A.detach())
    s = F.linear(hidden.float(), used).to(hidden.dtype)
    return torch.cat([hidden, s], dim=1), lora_B if scaling == 1.0 else lora_B * scaling


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
    V = head.V
    if M == 0 or V == 0:  # with an empty vocabulary every token is ignored
        return _zeros(hidden, need_grad_hidden)
    if K - head.rank == 0:
        losses, log_sums = losses_and_log_sums(hidden, labels, head)
        return losses, log_sums, _zeros(hidden, need_grad_hidden)[2]
    head = Head._make(contiguous(OP, field) if isinstance(field, Tensor) else field for field in head)
    device = device_type(hidden)
    problem = Problem(OP, device, hidden.dtype, M, V, K, head.rank, head.blocksize)
    losses, log_sums, rows = select(problem).run(
        flatten_to_2d(hidden), contiguous(OP, labels), head, need_grad_hidden=need_grad_hidden
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
    """losses of linear_cross_entropy and its gradients with respect to hidden, weight, bias and low_rank.

    Autograd inspects the arguments but not the fields of a bundle, so the three tensors of the head are also passed
    separately.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_rank: Tensor | None,
        head: Head,
        need_grad_hidden: bool,
        run: Callable[..., Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (losses, log_sums, rows); log_sums and rows have no gradient."""
        losses, log_sums, rows = run(hidden, labels, *head, need_grad_hidden)
        ctx.mark_non_differentiable(log_sums, rows)
        constants = (head.absmax, head.absmax_q, head.absmax_scale, head.absmax_offset)
        ctx.save_for_backward(hidden, labels, log_sums, rows, weight, bias, low_rank, *constants)
        ctx.numbers = {name: value for name, value in head._asdict().items() if isinstance(value, (int, float))}
        return losses, log_sums, rows

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of forward's arguments."""
        hidden, labels, log_sums, rows, weight, bias, low_rank, *constants = ctx.saved_tensors
        names = ("absmax", "absmax_q", "absmax_scale", "absmax_offset")
        fields = dict(zip(names, constants, strict=True))
        head = Head(weight, bias, low_rank=low_rank, **fields, **ctx.numbers)
        need_hidden, _, *need_of_head = ctx.needs_input_grad[:5]
        of_head: tuple[Tensor | None, ...] = (None, None, None)
        grad_hidden = None
        if torch.is_grad_enabled() or (need_hidden and rows.shape != hidden.shape):
            inputs = (hidden, weight, bias, low_rank)
            needs = (need_hidden, *need_of_head)
            wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
            gradients = iter(_gradients_composed(grad_losses, hidden, labels, head, wanted))
            grad_hidden, *of_head_list = [next(gradients) if needed else None for needed in needs]
            of_head = tuple(of_head_list)
        else:
            if need_hidden:
                grad_hidden = rows * grad_losses[:, None].to(rows.dtype)
            if any(need_of_head):
                of_head = _gradients_of_head(grad_losses, hidden, labels, head, log_sums, need_of_head)
        return grad_hidden, None, *of_head, None, None, None


def losses_and_log_sums(hidden: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return (losses [M], log_sums [M]) by torch's differentiable ops, over whole logits; log_sums is detached."""
    z = logits_of(hidden.float(), head.rows(0, head.V, hidden.dtype).float(), head, head.bias)
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
        hidden, labels, head.weight, head.bias, head.low_rank, head, need_grad_hidden, run
    )


differentiate(
    f"qlora_kernels::{OP}",
    _TAKES,
    _apply,
    compose=linear_cross_entropy_composed,
    constants=CONSTANTS,
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
    grad_losses: Tensor, hidden: Tensor, labels: Tensor, head: Head, log_sums: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the wanted gradients of (weight, bias, low_rank), over VOCABULARY_CHUNK rows of the weight at a time.

    needs: whether each of the three gradients is wanted.
    """
    need_weight, need_bias, need_low_rank = needs
    learned = labels != head.ignore_index
    of_token = torch.where(learned, grad_losses, 0.0)[:, None]
    relative = torch.where(learned, labels, -1)
    wide = torch.where(learned[:, None], hidden, 0.0).float()
    own = hidden.shape[1] - head.rank
    log_sums = torch.where(learned, log_sums, 0.0)
    grad_weight = torch.empty_like(head.weight) if need_weight else None
    grad_bias = torch.empty_like(head.bias) if need_bias and head.bias is not None else None
    grad_low_rank = torch.empty_like(head.low_rank) if need_low_rank and head.low_rank is not None else None
    for start in range(0, head.V, VOCABULARY_CHUNK):
        chunk = slice(start, min(start + VOCABULARY_CHUNK, head.V))
        rows = head.rows(chunk.start, chunk.stop, hidden.dtype).float()
        z = logits_of(wide, rows, head, None if head.bias is None else head.bias[chunk])
        grad_z = grad_of_logits(z, log_sums, relative - start, head) * of_token
        if grad_weight is not None:
            grad_weight[chunk] = grad_z.T @ wide[:, :own]
        if grad_bias is not None:
            grad_bias[chunk] = grad_z.sum(0)
        if grad_low_rank is not None:
            grad_low_rank[chunk] = grad_z.T @ wide[:, own:]
    return grad_weight, grad_bias, grad_low_rank


def _zeros(hidden: Tensor, need_grad_hidden: bool) -> tuple[Tensor, Tensor, Tensor]:
    losses = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    return losses, torch.zeros_like(losses), hidden.new_zeros(hidden.shape if need_grad_hidden else (0,))


def _check(hidden: Tensor, labels: Tensor, head: Head) -> None:
    check_float(OP, "hidden", hidden)
    check_given(OP, "weight", head.weight)
    check_given(OP, "labels", labels)
    if hidden.dim() != 2:
        raise ValueError(f"{OP}: hidden must have two dimensions, got shape {tuple(hidden.shape)}")
    _check_head(hidden, head)
    if labels.dtype != torch.int64 or tuple(labels.shape) != (hidden.shape[0],):
        expected = f"int64 with one label for each of the {hidden.shape[0]} tokens"
        raise ValueError(f"{OP}: labels must be {expected}, got {labels.dtype} {tuple(labels.shape)}")
    if labels.device != hidden.device:
        raise ValueError(f"{OP}: labels must be on {hidden.device}, got {labels.device}")
    if not math.isfinite(head.logit_scale) or not math.isfinite(head.softcap) or head.softcap < 0:
        got = f"{head.logit_scale} and {head.softcap}"
        raise ValueError(f"{OP}: logit_scale and softcap must be finite, and softcap not negative, got {got}")


def _check_head(hidden: Tensor, head: Head) -> None:
    weight, low_rank, nf4 = head.weight, head.low_rank, head.nf4
    if nf4 is None:
        check_float(OP, "weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"{OP}: weight must have two dimensions, got shape {tuple(weight.shape)}")
        if weight.device != hidden.device:
            raise ValueError(f"{OP}: weight must be on {hidden.device}, got {weight.device}")
    if low_rank is not None:
        check_float(OP, "low_rank", low_rank)
        if low_rank.dim() != 2 or low_rank.shape[0] != head.V or low_rank.shape[1] < 1:
            raise ValueError(f"{OP}: low_rank must have shape [V={head.V}, r] with r >= 1, got {tuple(low_rank.shape)}")
        if low_rank.device != hidden.device:
            raise ValueError(f"{OP}: low_rank must be on {hidden.device}, got {low_rank.device}")
    K = weight.shape[1] if nf4 is None else nf4.K
    check_last_dim(OP, "hidden", hidden, K + head.rank, "K" if low_rank is None else "K + r")
    if nf4 is not None:
        check_weight(OP, nf4, hidden.device)
    check_bias(OP, head.bias, head.V, hidden.device)


def _check_labels(labels: Tensor, head: Head) -> None:
    V = head.V
    wrong = ((labels < 0) | (labels >= V)) & (labels != head.ignore_index)
    if wrong.any():
        first = int(labels[wrong][0])
        raise ValueError(f"{OP}: labels must lie in [0, V={V}) or equal ignore_index={head.ignore_index}, got {first}")
