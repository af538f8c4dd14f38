"""Fused attention and MLP of LoRA layers over NF4 run as one autograd node each, with the results of the ops."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

import qlora_kernels as qk
from qlora_kernels.backends import cpu
from qlora_kernels.nn import fused_attention, fused_mlp
from qlora_kernels.nn.fused_sdpa import self_attention_ranges
from tests.cpu.test_instruction_sets import SETS
from tests.nn.one_node import NODES, adapted, assert_gradients, native, nodes_of, step
from tests.support.decoder_families import tokens
from tests.support.op_recorder import OpRecorder
from tests.support.tolerances import assert_same_function, assert_same_gradients


def left_padding():
    mask = torch.ones_like(tokens())
    mask[1, :4] = 0
    return {"attention_mask": mask}


@native
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [dict, left_padding], ids=["plain", "padded"])
def test_results_are_those_of_the_kernels_and_of_the_ops(by_kernels, by_ops, family, dtype, inputs):
    model = adapted(family, dtype=dtype)
    names, loss, grads = step(model, **inputs())
    by_kernels()
    _, of_kernels, grads_of_kernels = step(model, **inputs())
    by_ops()
    plain_names, plain_loss, plain_grads = step(model, **inputs())
    assert names == set(NODES)
    assert plain_names == set()
    assert torch.equal(loss, of_kernels)
    assert torch.equal(loss, plain_loss)
    assert_gradients(grads, grads_of_kernels, torch.float32)
    assert_gradients(grads, plain_grads, dtype)


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_whole_blocks_on_every_instruction_set(by_kernels, isa, dtype):
    """The norms are trained too, some factors are not, and some projections have no adapter."""
    cpu.instruction_set(isa)
    try:
        model = adapted(dtype=dtype, targets=["q_proj", "v_proj", "up_proj", "down_proj"], num_hidden_layers=1)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                "layernorm" in name or ("lora_A" in name) != ("up_proj" in name) or name.endswith("q_proj.lora_B")
            )
        names, loss, grads = step(model)
        by_kernels()
        _, of_kernels, expected = step(model)
    finally:
        cpu.instruction_set("")
    assert names == (set(NODES) if isa in ("amx_bf16_emulated", "avx512_bf16", "avx512", "avx2") else names)
    assert torch.equal(loss, of_kernels)
    assert_gradients(grads, expected, torch.float32)


@native
@pytest.mark.parametrize("watched", ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"])
def test_a_watched_norm_attention_or_mlp_is_called(by_ops, watched):
    model = adapted()
    seen = []
    for name, module in model.named_modules():
        if name.endswith(watched):
            module.register_forward_hook(lambda *_: seen.append(1))
    _, loss, grads = step(model)
    assert len(seen) == 2
    by_ops()
    _, plain_loss, plain_grads = step(model)
    assert torch.equal(loss, plain_loss)
    assert_gradients(grads, plain_grads, torch.float32)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_masks_are_those_of_the_ops(by_ops, dtype):
    """Each layer draws a seed, in the order in which the modules are called."""
    model = adapted(dropout=0.3, dtype=dtype)
    torch.manual_seed(5)
    names, loss, grads = step(model)
    by_ops()
    torch.manual_seed(5)
    _, plain_loss, plain_grads = step(model)
    assert names == set(NODES)
    assert torch.equal(loss, plain_loss)
    assert_gradients(grads, plain_grads, dtype)


@native
def test_dropout_masks_are_those_of_the_modules(monkeypatch):
    model = adapted(dropout=0.3)
    torch.manual_seed(5)
    loss = step(model)[1]
    for module in (fused_attention, fused_mlp):
        monkeypatch.setattr(module, "plain_projections", lambda *_: None)
    torch.manual_seed(5)
    names, by_modules, _ = step(model)
    assert names == set()
    assert_same_function(loss, by_modules)


@native
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "up_proj", "o_proj"]])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_projections_without_adapters(by_ops, targets, dropout):
    """PEFT adapts only q and v by default; an attention or MLP without an adapted input projection runs on the ops."""
    model = adapted(targets=targets, dropout=dropout)
    torch.manual_seed(5)
    names, loss, grads = step(model)
    by_ops()
    torch.manual_seed(5)
    _, plain_loss, plain_grads = step(model)
    assert names == (set(NODES) if "up_proj" in targets else {"LoRAAttentionFunctionBackward"})
    assert_same_function(loss, plain_loss)
    assert grads.keys() == plain_grads.keys()
    assert_same_gradients(grads, plain_grads)


@native
def test_training_with_labels_stores_no_keys_and_values():
    """With a cache, attention runs op by op. An explicit use_cache, and evaluation, keep the model's behaviour."""
    model, ids = adapted(use_cache=True), tokens()
    output = model(input_ids=ids, labels=ids)
    assert output.cache is None
    assert nodes_of(output.loss) == set(NODES)
    assert model(input_ids=ids, labels=ids, skip_logits=False).cache is None
    assert model(input_ids=ids, labels=ids, use_cache=True).cache is not None
    positions = torch.arange(ids.shape[1])[None]  # with which transformers looks for packed rows if there is no cache
    assert model(input_ids=ids, labels=ids, position_ids=positions).cache is not None
    assert model(ids, None, positions, labels=ids).cache is not None
    model.eval()
    assert model(input_ids=ids, labels=ids).cache is not None
    assert model.config.use_cache


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
@pytest.mark.parametrize("frozen", [["lora_A"], ["lora_B"], ["lora_A", "lora_B"]], ids="+".join)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_only_gradients_of_frozen_factors_read_is_not_saved(by_ops, frozen, dropout):
    """The normalized input of both blocks and the product of the MLP; with dropout the ops' kernels run."""

    def saved_bytes(*, freezes):
        model, sizes = adapted(num_hidden_layers=1, dropout=dropout), {}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (freezes and any(factor in name for factor in frozen)) and "lora" in name)
        model.enable_input_require_grads()
        owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = 0 if storage.data_ptr() in owned else storage.nbytes()
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            names, _, grads = step(model)
        return names, sum(sizes.values()), grads, model.config

    names, frozen_bytes, grads, config = saved_bytes(freezes=True)
    _, every_byte, every_grad, _ = saved_bytes(freezes=False)
    assert names == set(NODES)
    rows = 4 * tokens().numel() * (2 * config.hidden_size + config.intermediate_size)
    assert every_byte - frozen_bytes == (rows if "lora_A" in frozen else 0)
    assert grads.keys() == {name for name in every_grad if not any(factor in name for factor in frozen)}
    assert_same_gradients(grads, {name: every_grad[name] for name in grads})


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
@pytest.mark.parametrize("watched", [False, True])
def test_the_activation_is_looked_up_once_for_a_call(watched, monkeypatch):
    """Also where the MLP does not run as one node."""
    mlp = adapted(num_hidden_layers=1).get_submodule("model.layers.0.mlp")
    if watched:
        mlp.up_proj.register_forward_hook(lambda *_: None)
    lookups, right = [], fused_mlp.activation_of
    monkeypatch.setattr(fused_mlp, "activation_of", lambda act_fn: (lookups.append(act_fn), right(act_fn))[1])
    mlp(torch.randn(2, 3, mlp.gate_proj.in_features))
    assert lookups == [mlp.act_fn]


@native
def test_calls_that_a_node_does_not_compute_run_on_the_ops():
    """Autocast, hooks of all modules, a dropout mask for several layers, and an adapter that is switched off."""
    shared = adapted(dropout=0.1)
    qk.fuse_shared_input(shared)
    assert step(shared)[0] == set()
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


@native
def test_dispatch_modes_see_the_ops():
    model, ids = adapted(), tokens()
    with OpRecorder() as forward:
        loss = model(input_ids=ids, labels=ids).loss
    for name in ("linear_nf4_lora_group", "linear_nf4_lora"):
        assert forward.seen.count(f"qlora_kernels::{name}") == 4
    loss = model(input_ids=ids, labels=ids).loss
    assert nodes_of(loss) == set(NODES)
    with OpRecorder() as backward:
        loss.backward()
    for name in ("linear_nf4_lora_group_backward", "linear_nf4_lora_backward"):
        assert backward.seen.count(f"qlora_kernels::{name}") == 4


@native
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_and_copies(reentrant, dropout):
    model = adapted(dropout=dropout)
    torch.manual_seed(5)
    _, loss, grads = step(model)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again.enable_input_require_grads()
    torch.manual_seed(5)
    _, of_checkpoints, recomputed = step(again)
    assert torch.equal(loss, of_checkpoints)
    assert all(torch.equal(grads[name], recomputed[name]) for name in grads)


@native
def test_a_second_backward_is_refused_unless_the_graph_is_retained():
    model, ids = adapted(), tokens()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, once[name]) for name, p in model.named_parameters() if p.grad is not None)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@native
def test_compiled_model_runs_on_the_ops():
    """torch.compile traces the ops; a node would be opaque to it."""
    model = adapted(num_hidden_layers=1)
    _, loss, grads = step(model)
    _, compiled_loss, compiled_grads = step(torch.compile(model, backend="aot_eager"))
    assert_same_function(compiled_loss, loss)
    found = {name.removeprefix("_orig_mod."): grad for name, grad in compiled_grads.items()}
    assert_same_gradients(found, grads)


@native
def test_ranges_without_a_mask_are_made_once_for_a_call():
    cos, module = torch.ones(1, 3, 4), SimpleNamespace(is_causal=True)

    def ranges(batch, length, **arguments):
        hidden = torch.zeros(batch, length, 8)
        return self_attention_ranges(module, hidden, None, cos, dropout=0.0, **arguments)

    starts, ends = ranges(2, 3)
    assert starts.tolist() == [[0, 0, 0]] * 2
    assert ends.tolist() == [[1, 2, 3]] * 2
    assert ranges(2, 3)[1] is ends
    assert ranges(2, 3, is_causal=False)[1].tolist() == [[3, 3, 3]] * 2
    assert ranges(1, 4)[1].tolist() == [[1, 2, 3, 4]]
    assert ranges(2, 3)[1] is ends
