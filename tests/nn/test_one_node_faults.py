"""Faults planted in the autograd nodes of fused attention and MLP, which the comparison with the ops detects."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlora_kernels.ops import residual_block
from qlora_kernels.ops.lora_attention import LoRAAttention
from qlora_kernels.ops.lora_projection import Projection, SharedInput
from tests.nn.one_node import adapted, native, step
from tests.support.tolerances import assert_same_gradients


def _exchanged(result):
    of_x, grads = result
    return of_x, [*grads[2:4], *grads[:2], *grads[4:]]


def _last_is_lost(result):
    of_x, (*grads, last) = result
    return of_x, [*grads, torch.zeros_like(last)]


def _halved(result):
    of_x, grads = result
    return None if of_x is None else of_x / 2, grads


FAULTS = {
    "two adapters are exchanged": ("backward", _exchanged),
    "a gradient of lora_B is lost": ("backward", _last_is_lost),
    "the gradient of x is halved": (
        "backward",
        lambda result: (None if result[0] is None else result[0] / 2, result[1]),
    ),
    "an output is scaled": ("forward", lambda result: ([result[0][0] * 1.01, *result[0][1:]], result[1])),
    "the saved s is that of other rows": ("forward", lambda result: (result[0], [result[1][0].flip(0)])),
}


@native
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_shared_projections_is_detected(by_kernels, by_ops, fault, monkeypatch):
    by_kernels()
    name, change = FAULTS[fault]
    model, right = adapted(family="Gemma", num_key_value_heads=4), getattr(SharedInput, name)
    monkeypatch.setattr(SharedInput, name, lambda *args, **kwargs: change(right(*args, **kwargs)))
    _, loss, grads = step(model)
    by_ops()
    _, plain_loss, plain_grads = step(model)
    with pytest.raises(AssertionError):
        assert_same_gradients({**grads, "loss": loss}, {**plain_grads, "loss": plain_loss})


BLOCK_FAULTS = {
    "the residual is lost": ("gated_mlp", lambda result, x, *_: (result[0] - x, result[1])),
    "the norm of x is not saved": ("lora_attention", lambda result, x, *_: (result[0], result[1]._replace(n=x))),
    "the gradient of the residual is lost": (
        "gated_mlp_backward",
        lambda result, grad_y, *_: (result[0] - grad_y, *result[1:]),
    ),
    "two gradients are exchanged": (
        "lora_attention_backward",
        lambda result, *_: (*result[:2], [*result[2][2:4], *result[2][:2], *result[2][4:]]),
    ),
}


@native
@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_fault_in_the_kernel_of_a_block_is_detected(by_ops, fault, monkeypatch):
    op, change = BLOCK_FAULTS[fault]
    find = residual_block.find

    def with_fault(problem):
        spec = find(problem)
        if problem.op != op:
            return spec
        return replace(spec, run=lambda *args: change(spec.run(*args), *args))

    monkeypatch.setattr(residual_block, "find", with_fault)
    model = adapted(family="Gemma", num_key_value_heads=4)
    _, loss, grads = step(model)
    by_ops()
    _, plain_loss, plain_grads = step(model)
    with pytest.raises(AssertionError):
        assert_same_gradients({**grads, "loss": loss}, {**plain_grads, "loss": plain_loss})


@native
def test_fault_in_the_rotation_of_gradients_is_detected(by_kernels, by_ops, monkeypatch):
    by_kernels()
    rotate = LoRAAttention._rotate
    monkeypatch.setattr(LoRAAttention, "_rotate", lambda node, q, k, inverse: rotate(node, q, k, inverse=False))
    model = adapted()
    grads = step(model)[2]
    by_ops()
    with pytest.raises(AssertionError):
        assert_same_gradients(grads, step(model)[2])


@native
def test_fault_in_the_seeds_is_detected(by_ops, monkeypatch):
    """A node whose backward draws other masks than its forward."""
    right = Projection.backward

    def other_mask(self, *args, **kwargs):
        return right(self._replace(lora=self.lora._replace(seed=self.lora.seed + 1)), *args, **kwargs)

    model = adapted(dropout=0.3)
    monkeypatch.setattr(Projection, "backward", other_mask)
    torch.manual_seed(5)
    grads = step(model)[2]
    by_ops()
    monkeypatch.setattr(Projection, "backward", right)
    torch.manual_seed(5)
    with pytest.raises(AssertionError):
        assert_same_gradients(grads, step(model)[2])
