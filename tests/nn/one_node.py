"""Decoders whose attention and MLP run as one autograd node each, and their training step."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.backends import cpu
from tests.support.decoder_families import tiny_decoder, tokens
from tests.support.tolerances import assert_same_gradients

native = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native CPU backend is not built")
NODES = ("GatedMLPFunctionBackward", "LoRAAttentionFunctionBackward")


def adapted(family="Llama", *, dropout=0.0, dtype=torch.float32, targets="all-linear", **settings):
    """Return a fused tiny decoder over NF4 with LoRA factors that are not zero."""
    model = tiny_decoder(family, **{"use_cache": False, **settings}).to(dtype)
    qk.replace_linear(model)
    config = qk.peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=dropout)
    model = qk.peft.get_peft_model(model, config).train()
    qk.fuse_model(model)
    return model


def nodes_of(loss):
    """Return the names of the graph's nodes that compute several ops, without repetition."""
    seen, pending, names = set(), [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(type(node).__name__)
        pending.extend(parent for parent, _ in node.next_functions)
    return names.intersection(NODES)


def step(model, **inputs):
    ids = tokens()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    names = nodes_of(loss)
    loss.backward()
    return names, loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_gradients(grads, expected, dtype):
    """In fp32 the bits are equal. In 16 bits, a node rounds the sum of the residual's gradient and the norm's, and the
    ops round the norm's gradient and then the sum.
    """
    assert grads.keys() == expected.keys()
    if dtype == torch.float32:
        assert all(torch.equal(grads[name], expected[name]) for name in expected)
    else:
        assert_same_gradients({n: g.to(dtype) for n, g in grads.items()}, {n: g.to(dtype) for n, g in expected.items()})
