"""The loss of an output head without the logits of all tokens in memory, for each kind of head that fuse_model serves.

A dense or NF4 head, with or without low-rank updates, runs on the op linear_cross_entropy. Every other adapted head
(with dropout on the adapter, DoRA, IA3, a trained copy of the layer) is called on CHUNK tokens at a time; the backward
pass calls it once more. Heads of unknown classes, and heads with hooks, are left to the model's own forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..format.quant_state import FLOAT_DTYPES, QuantState
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.registry import unavailable
from .linear_nf4 import LinearNF4
from .made_class import MadeClass
from .module_tree import has_hooks

CHUNK = 256
"""Number of tokens for which a head that is called has its logits in memory."""

_TOKENWISE = ("peft.tuners.lora.", "peft.utils.other")
"""Modules of Hugging Face PEFT whose layers compute each token's output from that token alone."""


class HeadOperands(NamedTuple):
    """The arguments of linear_cross_entropy that describe a head."""

    weight: Tensor
    state: QuantState | None
    bias: Tensor | None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0


def serves_head(head: nn.Module, vocabulary: int) -> bool:
    """Whether `head_loss` computes the loss of this head. vocabulary: the number of logits that the model expects."""
    if getattr(head, "out_features", None) != vocabulary or any(has_hooks(module) for module in head.modules()):
        return False
    if head_operands(head) is None and not _is_tokenwise(head):
        return False
    tensor = next((t for t in (*head.parameters(), *head.buffers())), None)
    backend = None if tensor is None else {"cpu": "cpu", "cuda": "triton"}.get(tensor.device.type)
    return backend is not None and unavailable(backend) is None


def head_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    softcap: float | None,
    num_items_in_batch: Tensor | float | None,
) -> Tensor:
    """Return the mean loss as linear_cross_entropy defines it.

    head: one for which `serves_head` holds.   hidden: [..., K].   labels: int64 [...], not shifted.
    """
    operands = head_operands(head, hidden.dtype)
    if operands is not None:
        return linear_cross_entropy(
            hidden,
            operands.weight,
            labels,
            operands.bias,
            state=operands.state,
            lora_A=operands.lora_A,
            lora_B=operands.lora_B,
            scaling=operands.scaling,
            ignore_index=ignore_index,
            softcap=softcap,
            num_items_in_batch=num_items_in_batch,
        )
    learned = labels != ignore_index
    count: Any = learned.sum() if num_items_in_batch is None else num_items_in_batch
    total = _called_in_chunks(head, hidden[learned], labels[learned], softcap)
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def head_operands(head: nn.Module, dtype: torch.dtype | None = None) -> HeadOperands | None:
    """Return the operands of a head that computes hidden @ (W + scaling * B A)^T + bias; None for any other head.

    dtype: of the hidden states, which an NF4 layer may cast; None to leave that question open.
    """
    update = None
    if hasattr(head, "plain_form"):  # an adapted layer of qlora_kernels.peft
        form = cast(Any, head).plain_form()
        if form is None:
            return None
        head, update = form
    if type(head) is nn.Linear:
        weight = head.weight
        # A subclass of Tensor such as DTensor has no memory of its own.
        if type(weight) is not nn.Parameter or weight.dtype not in FLOAT_DTYPES:
            return None
        operands = HeadOperands(weight, None, head.bias)
    elif type(head) is LinearNF4:
        if head.compute_dtype is not None and dtype not in (None, head.compute_dtype):
            return None
        if type(head.packed) not in (Tensor, nn.Parameter):
            return None
        operands = HeadOperands(head.packed, head.quant_state, head.bias)
    else:
        return None
    return operands if update is None else operands._replace(lora_A=update[0], lora_B=update[1], scaling=update[2])


def _is_tokenwise(head: nn.Module) -> bool:
    """Return whether the head can be called on a part of the tokens."""
    if hasattr(head, "plain_form"):
        return bool(cast(Any, head).is_tokenwise)
    if isinstance(head, MadeClass):  # a layer whose parameters an adapter replaces
        return isinstance(head, nn.Linear)
    return type(head) is LinearNF4 or type(head).__module__.startswith(_TOKENWISE)


def _called_in_chunks(head: nn.Module, hidden: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Return the sum of the losses of hidden [M, K]. The logits of a chunk are computed again in the backward pass."""

    def loss_of(rows: Tensor, of_rows: Tensor) -> Tensor:
        logits = head(rows).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, of_rows, reduction="sum")

    total = hidden[:0].float().sum()
    for rows, of_rows in zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True):
        if len(rows) == 0:
            continue
        if torch.is_grad_enabled():
            total = total + checkpoint(loss_of, rows, of_rows, use_reentrant=False)
        else:
            total = total + loss_of(rows, of_rows)
    return total
