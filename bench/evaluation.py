"""evaluate: the loss of one batch without gradients, as an evaluation computes it for a perplexity.

The architecture and the batch are those of the training step (bench/end_to_end.py), with linear layers in NF4. Peers
compute the logits of all tokens and transformers' cross-entropy; ours, with fuse_model, computes only the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import qlora_kernels as qk

from . import end_to_end, layers
from .end_to_end import ARCHITECTURES, Inputs
from .registry import COLD, Call, Case, Contender, Cost, Suite


def cases(device: str) -> Iterator[Case]:
    """Yield the smaller model, and two blocks of it for the quick run."""
    for case in end_to_end.cases(device):
        if end_to_end.is_small(case):
            yield replace(case, op="evaluate", r=0)


def cost(case: Case) -> Cost:
    """Return the cost of one pass over the linear layers and the head, without attention and the rest."""
    return Cost(0, 2 * case.M * ARCHITECTURES[case.label].linear_weights)


def quantized(inputs: Inputs, *, fused: bool) -> nn.Module:
    """Return the source model over LinearNF4 layers."""
    model = copy.deepcopy(inputs.source)
    qk.replace_linear(model)
    if fused:
        qk.fuse_model(model)
    return model.eval()


def bitsandbytes(inputs: Inputs) -> nn.Module:
    """Return the source model over Linear4bit layers in the mode that is fastest without gradients."""
    return end_to_end.with_linears(inputs.source, lambda linear: layers.linear4bit(linear.weight.detach())).eval()


def loss_of(model: nn.Module, tokens: Tensor, **arguments: bool) -> Tensor:
    """Return the loss of the batch, computed without gradients."""
    with torch.no_grad():
        loss: Tensor = model(input_ids=tokens, labels=tokens, **arguments).loss
    return loss


def contender(make: Callable[[Inputs], nn.Module], **arguments: bool) -> Callable[[Case, Inputs, int], Sequence[Call]]:
    """Return the calls of an implementation whose model is make(inputs). arguments: passed to each call of the
    model.
    """
    return lambda case, inputs, copies: [partial(loss_of, make(inputs), inputs.tokens, **arguments)]


SUITE = Suite(
    op="evaluate",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        Contender("ours", contender(partial(quantized, fused=False)), end_to_end.whole_model),
        Contender("ours, fused", contender(partial(quantized, fused=True), skip_logits=True), end_to_end.whole_model),
        Contender(
            "bnb",
            contender(bitsandbytes),
            end_to_end.whole_model,
            packages=("bitsandbytes",),
        ),
        Contender("dense", contender(lambda inputs: copy.deepcopy(inputs.dequantized).eval()), end_to_end.whole_model),
    ),
    verify=end_to_end.verify,
    modes=(COLD,),
    packages=("transformers",),
)
