"""Cross-entropy of a language model without the logits of the whole batch in memory.

Logits are [tokens, vocabulary]: 200 MB for 1024 x 49152 in fp32, and as much for each of softmax and gradient, far more
than the activations of a small model. Therefore the model runs up to its output head, and head and loss run over
`chunk` tokens at a time. The gradient with respect to a chunk's hidden states is computed in the forward pass, while
its logits exist; recomputing them in the backward pass would cost one more product with the head.

A frozen linear head, the usual case with adapters, needs no autograd: the gradient, softmax minus one-hot, overwrites
its logits. This runs over a few rows at a time in two fp32 scratch buffers that stay in cache. With autograd, several
fp32 tensors of a chunk's size would be allocated, and page faults would cost more than arithmetic.

On a CPU with the native library, such a head runs on the op linear_cross_entropy, which does not store logits.

A chunk is large enough for its products to run near peak speed: products over 128 tokens took a third longer than over
256 (two Zen 4 cores, vocabulary 49152), and over 1024 a tenth less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.module_tree import has_hooks
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.registry import unavailable
from .batches import Batch
from .sharded_model import reshard
from .windows import IGNORED

Head = Callable[[Tensor], Tensor]


class ChunkedLoss:
    """loss(batch) -> the sum, in fp32, of -log p(label) over the batch's learned tokens.

    model: called as model(input_ids=, attention_mask=, use_cache=False), with get/set_output_embeddings as transformers
    models have them. Batches are moved to the device of its first parameter.
    chunk: tokens whose logits are in memory at one time.
    Under fully_shard, `model` is the outermost group, which stays gathered after its forward, as the head has to be.
    Some architectures scale or cap the logits after the head. This is detected by one forward over a few tokens; the
    logits of such a model are computed whole.
    """

    def __init__(self, model: nn.Module, chunk: int = 256) -> None:
        self.model = cast(Any, model)
        self.chunk = chunk
        self.device = next(model.parameters()).device
        self.chunked = self._head_is_last()

    def __call__(self, batch: Batch) -> Tensor:
        batch = batch.to(self.device)
        labels = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).flatten()
        learned = labels != IGNORED
        if not self.chunked:
            logits = self._forward(batch).flatten(0, 1)[learned]
            return F.cross_entropy(logits.float(), labels[learned], reduction="sum")
        with self._without_head() as head:
            hidden = self._forward(batch).flatten(0, 1)
        if _runs_on_the_op(head, hidden):
            linear = cast(nn.Linear, head)
            return linear_cross_entropy(
                hidden, linear.weight, labels, linear.bias, ignore_index=IGNORED, reduction="sum"
            )
        parameters = [p for p in head.parameters() if p.requires_grad]
        total: Tensor = ChunkedCrossEntropy.apply(hidden[learned], labels[learned], head, self.chunk, *parameters)  # type: ignore[no-untyped-call]
        return total

    def _forward(self, batch: Batch) -> Tensor:
        # Only packed batches have position ids: not every model takes them.
        positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        output = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **positions
        )
        return cast(Tensor, output.logits)

    @contextmanager
    def _without_head(self) -> Iterator[nn.Module]:
        """Yield the model's head, while the model's `logits` are the hidden states that are the head's input."""
        head = self.model.get_output_embeddings()
        self.model.set_output_embeddings(nn.Identity())
        try:
            yield head
        finally:
            self.model.set_output_embeddings(head)

    @torch.no_grad()
    def _head_is_last(self) -> bool:
        if self.model.get_output_embeddings() is None:
            return False
        training = self.model.training
        self.model.eval()
        ids = torch.arange(4, device=self.device)[None]
        batch = Batch(ids, ids, None)
        with self._without_head() as head:
            hidden = self._forward(batch)
        same = torch.equal(head(hidden), self._forward(batch))
        reshard(self.model)
        self.model.train(training)
        return same


def _runs_on_the_op(head: nn.Module, hidden: Tensor) -> bool:
    """Whether linear_cross_entropy computes this head and loss, on tensors for which its CPU kernel was measured."""
    return (
        type(head) is nn.Linear
        and not has_hooks(head)
        and not any(p.requires_grad for p in head.parameters())
        and type(head.weight) is nn.Parameter
        and hidden.is_cpu
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and head.weight.dtype == hidden.dtype
        and unavailable("cpu") is None
    )


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of cross_entropy(head(hidden), labels), differentiable in hidden [T, H] and in the head's parameters."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: nn.Module, chunk: int, *parameters: Tensor) -> Tensor:
        needs_grad = hidden.requires_grad or bool(parameters)
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_parameters = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        frozen = _FrozenLinearHead(head, hidden, chunk) if type(head) is nn.Linear and not parameters else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            if frozen is not None:
                grad_rows = None if grad_hidden is None else grad_hidden[rows]
                total += frozen.loss(hidden[rows], labels[rows], grad_rows)
                continue
            if grad_hidden is None:
                total += F.cross_entropy(head(hidden[rows]).float(), labels[rows], reduction="sum")
                continue
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_()
                loss = F.cross_entropy(head(part).float(), labels[rows], reduction="sum")
                grad_hidden[rows], *grads = torch.autograd.grad(loss, [part, *parameters])
            for grad_total, grad in zip(grad_parameters, grads, strict=True):
                grad_total += grad
            total += loss.detach()
        if needs_grad:
            ctx.save_for_backward(
                grad_hidden, *(g.to(p.dtype) for g, p in zip(grad_parameters, parameters, strict=True))
            )
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *grad_parameters = (grad * grad_outputs[0].to(grad.dtype) for grad in ctx.saved_tensors)
        return grad_hidden, None, None, None, *grad_parameters


class _FrozenLinearHead:
    """Loss and gradient of logits = hidden W^T + b with constant W and b, in buffers that all chunks share."""

    SCRATCH_ROWS = 16
    """Rows in the scratch buffers at one time: 3 MB of fp32 logits at a vocabulary of 49152, and as much of softmax."""

    def __init__(self, head: nn.Linear, hidden: Tensor, chunk: int) -> None:
        self.weight = head.weight.detach().to(hidden.dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(hidden.dtype)
        vocabulary = len(self.weight)
        self.logits = hidden.new_empty(min(chunk, len(hidden)), vocabulary)
        kind = torch.promote_types(hidden.dtype, torch.float32)
        self.scratch = hidden.new_empty(2, self.SCRATCH_ROWS, vocabulary, dtype=kind)

    def loss(self, hidden: Tensor, labels: Tensor, grad_hidden: Tensor | None) -> Tensor:
        """Return the sum over hidden's rows, and write the gradient into grad_hidden, if given."""
        logits = torch.mm(hidden, self.weight.T, out=self.logits[: len(hidden)])
        if self.bias is not None:
            logits += self.bias
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), self.SCRATCH_ROWS):
            rows = slice(start, start + self.SCRATCH_ROWS)
            total += self._rows_loss(logits[rows], labels[rows, None], grad_hidden is not None)
        if grad_hidden is not None:
            torch.mm(logits, self.weight, out=grad_hidden)
        return total

    def _rows_loss(self, logits: Tensor, labels: Tensor, wants_grad: bool) -> Tensor:
        wide, probabilities = self.scratch[:, : len(logits)]
        wide.copy_(logits)
        chosen = wide.gather(1, labels) - wide.amax(dim=1, keepdim=True)
        torch.softmax(wide, dim=1, out=probabilities)
        # The largest probability is exp(0) / sum of exp(logit - largest), from which the sum follows.
        log_normalizer = -probabilities.amax(dim=1, keepdim=True).log()
        if wants_grad:
            probabilities.scatter_add_(1, labels, probabilities.new_full((1, 1), -1.0).expand_as(labels))
            logits.copy_(probabilities)
        total: Tensor = (log_normalizer - chosen).sum()
        return total
