"""DistributedDataParallel over every method: gradients equal one process's, and the number of broadcast bytes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qlora_kernels as qk
from qlora_kernels.nn.quantized_weight import QuantizedWeight
from tests.distributed.models import Net, assert_same, batch, build, gradients, loss_of
from tests.distributed.processes import Group
from tests.peft.cases import CASES
from tests.peft.cases import build as build_case
from tests.peft.models import batch as tokens
from tests.peft.models import logits, randomize
from tests.support.tolerances import assert_same_gradients


def methods(group: Group) -> None:
    """Two processes with half a batch each have the gradients of the whole batch, and no parameter is unused."""
    for case in CASES:
        for kind in ("llama", "bert"):
            whole, half = build_case(case, kind), build_case(case, kind)
            for model in (whole, half):
                randomize(model)
                model.train()
            inputs = tokens(kind, rows=4)
            logits(whole, inputs).square().mean().backward()
            wrapped = DistributedDataParallel(half)
            part = {key: value[2 * group.rank : 2 * group.rank + 2] for key, value in inputs.items()}
            logits(wrapped, part).square().mean().backward()
            expected = {n: p.grad for n, p in whole.named_parameters() if p.requires_grad}
            assert_same_gradients({n: p.grad for n, p in half.named_parameters() if p.requires_grad}, expected)


class Inside(nn.Module):
    """A module with another model and a buffer of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x):
        return self.inner(x) * self.scale[0]


def counted(wrapped: DistributedDataParallel) -> list[int]:
    """Return a list to which each forward of `wrapped` adds the number of bytes it broadcasts."""
    sizes: list[int] = []
    broadcast = wrapped._distributed_broadcast_coalesced

    def count(tensors, *arguments, **options):
        sizes.append(sum(tensor.nbytes for tensor in tensors))
        return broadcast(tensors, *arguments, **options)

    wrapped._distributed_broadcast_coalesced = count
    return sizes


def broadcast_bytes(group: Group) -> None:
    """The NF4 bytes are sent once, when the wrapper is made; a forward sends only other buffers."""

    def plain():
        torch.manual_seed(0)
        model = Net()
        qk.replace_linear(model, skip=("head",))
        return model

    for make in (build, lambda: build(mixture=True), plain):
        model = Inside(make())
        keys = list(model.state_dict())
        wrapped = DistributedDataParallel(model)
        sizes = counted(wrapped)
        for _ in range(3):
            loss_of(wrapped, batch()).backward()
        assert sizes == [24, 24, 24], sizes
        assert list(model.state_dict()) == keys
        model.load_state_dict(model.state_dict())
        assert all(m.in_parameters for m in model.modules() if isinstance(m, QuantizedWeight))


def weights_of_the_first_process(group: Group) -> None:
    """As for dense weights, all processes compute with the weights of rank 0."""
    reference = build(seed=0)
    loss_of(reference, batch()).backward()
    model = build(seed=group.rank)
    loss_of(DistributedDataParallel(model), batch()).backward()
    assert_same(gradients(model), gradients(reference))


def merged_and_unloaded(group: Group) -> None:
    """Weights that are quantized again under the wrapper are not broadcast in forward."""
    model = build()
    wrapped = DistributedDataParallel(model)
    loss_of(wrapped, batch()).backward()
    model.merge_adapter(target="nf4")
    sizes = counted(wrapped)
    with torch.no_grad():
        wrapped(batch())
    assert sizes == [], sizes


def constant_buffers(group: Group) -> None:
    """VeRA's matrices, which each process computes alike, are not broadcast in forward."""
    model = build_case("vera", "llama", nf4=True)
    wrapped = DistributedDataParallel(model)
    sizes = counted(wrapped)
    logits(wrapped, tokens("llama", rows=2)).square().mean().backward()
    assert sum(sizes) <= 32, sizes  # the frequencies of rotary embeddings


CHECKS = {
    f.__name__: f
    for f in (methods, broadcast_bytes, weights_of_the_first_process, merged_and_unloaded, constant_buffers)
}
