"""Fused attention and MLP of LoRA layers over NF4 run as one autograd node each, with the results of the ops."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_kernels as qk
from qlora_kernels.backends import cpu
from qlora_kernels.ops import gated_mlp, lora_attention
from tests.support.decoder_families import tiny_decoder, tokens
from tests.support.tolerances import assert_same_gradients

native = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native CPU backend is not built")
NODES = ("GatedMLPFunctionBackward", "LoRAAttentionFunctionBackward")


def adapted(family="Llama", *, dropout=0.0, dtype=torch.float32):
    """Return a fused tiny decoder over NF4 with LoRA factors that are not zero."""
    model = tiny_decoder(family, use_cache=False).to(dtype)
    qk.replace_linear(model)
    config = qk.peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
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


@pytest.fixture
def by_ops(monkeypatch):
    """Return a function that makes every call run on the ops."""

    def switch():
        for module in (gated_mlp, lora_attention):
            monkeypatch.setattr(module, "run_as_one_node", lambda *_: False)

    return switch


def left_padding():
    mask = torch.ones_like(tokens())
    mask[1, :4] = 0
    return {"attention_mask": mask}


@native
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [dict, left_padding], ids=["plain", "padded"])
def test_results_have_the_bits_of_the_ops(by_ops, family, dtype, inputs):
    model = adapted(family, dtype=dtype)
    names, loss, grads = step(model, **inputs())
    by_ops()
    plain_names, plain_loss, plain_grads = step(model, **inputs())
    assert names == set(NODES)
    assert plain_names == set()
    assert torch.equal(loss, plain_loss)
    assert grads.keys() == plain_grads.keys()
    assert all(torch.equal(grads[name], plain_grads[name]) for name in grads)


@native
def test_only_needed_gradients_are_returned(by_ops):
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(("up_proj" in name and "lora_B" in name) or ("v_proj" in name and "lora_A" in name))
    names, _, grads = step(model)
    by_ops()
    _, _, plain = step(model)
    assert names == set(NODES)
    assert grads.keys() == plain.keys()
    assert all(torch.equal(grads[name], plain[name]) for name in grads)


@native
def test_second_derivatives_are_those_of_the_ops(by_ops):
    model, ids = adapted(), tokens()
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def second():
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        first = torch.autograd.grad(logits.square().mean(), [embedded, *factors], create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), [embedded, *factors])

    found = second()
    by_ops()
    assert_same_gradients(dict(enumerate(found)), dict(enumerate(second())))


@native
def test_a_watched_projection_is_called():
    model = adapted()
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("layers.0.mlp.up_proj", "layers.0.self_attn.k_proj")):
            module.register_forward_hook(lambda *_: seen.append(1))
    step(model)
    assert len(seen) == 2


@native
def test_calls_that_a_node_does_not_compute_run_on_the_ops():
    """Dropout, autocast, hooks of all modules, and an adapter that is switched off."""
    assert step(adapted(dropout=0.1))[0] == set()
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        assert step(model)[0] == set()
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    assert step(model)[0] == set()
    handle.remove()
    assert sum(isinstance(module, qk.LinearNF4) or hasattr(module, "plain_form") for module in seen) >= 14
    with model.disable_adapter(), torch.no_grad():
        model(input_ids=tokens())


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@native
def test_dispatch_modes_see_the_ops():
    model, ids = adapted(), tokens()
    with Recorder() as forward:
        loss = model(input_ids=ids, labels=ids).loss
    assert forward.seen.count("qlora_kernels::linear_nf4_lora") == 14
    loss = model(input_ids=ids, labels=ids).loss
    assert nodes_of(loss) == set(NODES)
    with Recorder() as backward:
        loss.backward()
    assert backward.seen.count("qlora_kernels::linear_nf4_lora_backward") == 14


@native
def test_checkpointing_and_copies():
    model = adapted()
    _, loss, grads = step(model)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, of_checkpoints, recomputed = step(again)
    assert torch.equal(loss, of_checkpoints)
    assert all(torch.equal(grads[name], recomputed[name]) for name in grads)
