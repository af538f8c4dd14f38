"""fuse_model in training: the loss without logits, and attention on the op for every mask that consists of ranges."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.backends import cpu
from qlora_kernels.nn import fused_sdpa, head_loss
from tests.support.decoder_families import FAMILIES, tiny_decoder, tokens
from tests.support.tolerances import assert_same_function, assert_same_gradients

families = pytest.mark.parametrize("family", FAMILIES)
pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native CPU backend is not built")


@pytest.fixture
def calls(monkeypatch):
    """Record the names of the ops that fused modules call, in order."""
    seen = []

    def spied(place, name):
        original = getattr(place, name)

        def call(*args, **kwargs):
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(place, name, call)

    spied(head_loss, "linear_cross_entropy")
    spied(fused_sdpa, "attention")
    return seen


def step(model, ids, **inputs):
    """Return the loss and gradients of a training step."""
    model.train().zero_grad()
    output = model(ids, **{"labels": ids, **inputs})
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(fused, plain):
    assert_same_function(fused[0].loss, plain[0].loss, "loss")
    assert_same_gradients(fused[1], plain[1])


def left_padding(ids):
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def right_padding(ids):
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(ids):
    positions = torch.cat([torch.arange(4), torch.arange(ids.shape[1] - 4)]).expand_as(ids)
    return {"position_ids": positions}


BATCHES = {"plain": lambda ids: {}, "left": left_padding, "right": right_padding, "packed": packed}


@families
@pytest.mark.parametrize("batch", BATCHES)
def test_a_training_step(family, batch):
    """Loss and gradients do not change, also for padded and packed batches, and logits are left out."""
    model, ids = tiny_decoder(family, sliding_window=5) if family == "Mistral" else tiny_decoder(family), tokens()
    inputs = BATCHES[batch](ids)
    plain = step(model, ids, **inputs)
    qk.fuse_model(model)
    fused = step(model, ids, **inputs)
    assert fused[0].logits is None
    assert_same_step(fused, plain)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [None, 5])
def test_every_mask_of_ranges_runs_on_the_op(calls, batch, window):
    model, ids = tiny_decoder("Mistral", sliding_window=window), tokens()
    qk.fuse_model(model)
    step(model, ids, **BATCHES[batch](ids))
    assert calls == ["attention", "attention", "linear_cross_entropy"]


def test_unsupported_attention_calls_use_torch(calls):
    """Dropout, a mask with gaps, a single query, the eager implementation, and fuse_model(attention=False)."""
    model, ids = tiny_decoder("Llama"), tokens()
    report = qk.fuse_model(model)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[:, :, 6, 2] = False
    with torch.no_grad():
        model(ids, attention_mask=mask)
        cache = model(ids, use_cache=True).cache
        calls.clear()
        model(ids[:, :1], cache=cache)
        model.config._attn_implementation = "eager"
        model(ids)
        model.config._attn_implementation = "sdpa"
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train()(ids)
    assert calls == []
    report.undo()
    model.eval()
    qk.fuse_model(model, attention=False)
    model(ids)
    assert calls == []


def test_masks_with_gaps_have_no_ranges():
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    starts, ends = fused_sdpa.key_ranges(mask, 2)
    assert starts.tolist() == [[0] * 6] * 2
    assert ends.tolist() == [[1, 2, 3, 4, 5, 6]] * 2
    mask[0, 0, 5, 2] = False
    assert fused_sdpa.key_ranges(mask, 2) is None, "written to since"
    mask[0, 0, 5] = False
    starts, ends = fused_sdpa.key_ranges(mask, 2)
    assert starts[0, 5] == ends[0, 5]
    assert fused_sdpa.key_ranges(mask.float(), 2) is None
    assert fused_sdpa.key_ranges(mask.expand(1, 2, 6, 6), 1) is None
    with torch.inference_mode():
        assert fused_sdpa.key_ranges(torch.ones(1, 1, 3, 3, dtype=torch.bool), 1)[1].tolist() == [[3, 3, 3]]


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_loss_arguments_of_trainer(family):
    model, ids = tiny_decoder(family), tokens()
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    shifted[0, 3] = -100
    for arguments in (
        {"num_items_in_batch": torch.tensor(11)},
        {"num_items_in_batch": 11},
        {"shift_labels": shifted},
        {"labels": ids.masked_fill(ids % 3 == 0, -100)},
    ):
        plain = step(model, ids, **arguments)
        with_report = qk.fuse_model(model)
        fused = step(model, ids, **arguments)
        assert fused[0].logits is None
        assert_same_step(fused, plain)
        with_report.undo()


def test_logits_returned_unless_skipped(calls):
    """By default they are omitted in training with labels; skip_logits overrides this."""
    model, ids = tiny_decoder("Llama"), tokens()
    expected = model(ids, labels=ids)
    qk.fuse_model(model, attention=False)
    evaluated = model(ids, labels=ids)
    assert_same_function(evaluated.logits, expected.logits)
    assert calls == []
    assert model(ids, labels=ids, skip_logits=True).logits is None
    assert_same_function(model(ids, labels=ids, skip_logits=True).loss, expected.loss)
    model.train()
    assert model(ids).logits is not None
    assert model(ids, labels=ids, skip_logits=False).logits is not None
    assert model(ids, labels=ids, logits_to_keep=0).logits is None
    loss, logits = model(ids, labels=ids, return_dict=False)[:2]
    assert (loss.dim(), logits.dim()) == (0, 3)


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)


def other_head(model):
    model.lm_head = nn.Sequential(model.lm_head)


def other_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().mean()


@pytest.mark.parametrize("change", [hooked, other_head, other_loss], ids=lambda change: change.__name__)
def test_changed_head_or_loss_uses_original_forward(calls, change):
    model, ids = tiny_decoder("Llama"), tokens()
    qk.fuse_model(model, attention=False)
    change(model)
    fused, _ = step(model, ids)
    assert fused.logits is not None
    assert calls == []
    qk.unfuse_model(model)
    assert_same_function(fused.loss, step(model, ids)[0].loss)


def with_nf4(model):
    qk.replace_linear(model, skip=())
    assert isinstance(model.lm_head, qk.LinearNF4)
    return model


def with_lora(model, **options):
    config = qk.peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False, **options)
    return qk.peft.get_peft_model(model, config)


def with_two_adapters(model):
    model = with_lora(with_nf4(model))
    model.add_adapter("second", qk.peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
    model.set_adapter(["default", "second"])
    return model


def with_a_trained_copy(model):
    return qk.peft.get_peft_model(model, qk.peft.LoraConfig(r=2, modules_to_save=["lm_head"]))


def with_hugging_face_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


HEADS = {
    "nf4": (with_nf4, True),
    "lora": (with_lora, True),
    "lora over nf4": (lambda model: with_lora(with_nf4(model)), True),
    "two adapters": (with_two_adapters, True),
    "bias of lora": (lambda model: with_lora(model, lora_bias=True), False),
    "dora": (lambda model: with_lora(model, use_dora=True), False),
    "trained copy": (with_a_trained_copy, False),
    "peft's lora": (with_hugging_face_lora, False),
}
"""Name -> (the head, whether it runs on the op). The others are called on a few tokens at a time."""


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("kind", HEADS)
def test_quantized_and_adapted_heads(calls, monkeypatch, kind, family):
    """Loss and gradients stay, the head's own included, whatever runs the head."""
    make, on_op = HEADS[kind]
    monkeypatch.setattr(head_loss, "CHUNK", 4)
    torch.manual_seed(0)
    model, ids = make(tiny_decoder(family)), tokens()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = {"labels": ids.masked_fill(ids % 4 == 0, -100), "num_items_in_batch": torch.tensor(11)}
    base.requires_grad_(False) if kind == "nf4" else None
    base.model.embed_tokens.weight.requires_grad_()
    plain = step(base, ids, **inputs)
    assert qk.fuse_model(base, attention=False).replaced
    fused = step(base, ids, **inputs)
    assert fused[0].logits is None
    assert ("linear_cross_entropy" in calls) == on_op
    assert any("lm_head" in name for name in fused[1]) or kind == "nf4"
    assert_same_step(fused, plain)
    with torch.no_grad():
        assert_same_function(base(ids, skip_logits=True, **inputs).loss, plain[0].loss)


def test_no_logits_beyond_a_chunk(monkeypatch):
    monkeypatch.setattr(head_loss, "CHUNK", 4)
    model, ids = with_lora(tiny_decoder("Llama"), lora_dropout=0.5), tokens()
    base = model.get_base_model()
    qk.fuse_model(base)
    rows, forward = [], type(base.lm_head).forward
    monkeypatch.setattr(type(base.lm_head), "forward", lambda self, x: (rows.append(len(x)), forward(self, x))[1])
    losses = {step(base, ids)[0].loss.item() for _ in range(2)}
    assert len(losses) == 2, "dropout acts"
    assert max(rows) == 4


def test_unsupported_heads_use_original_forward(calls):
    """Adapters chosen row by row, and hooks inside an adapted head, keep the model's own forward."""
    model, ids = with_lora(tiny_decoder("Llama")), tokens()
    base = model.get_base_model()
    qk.fuse_model(base, attention=False)
    model.train()
    assert model(input_ids=ids, labels=ids, adapter_names=["default", "__base__"]).logits is not None
    base.lm_head.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    assert model(input_ids=ids, labels=ids).logits is not None
    assert calls == []


def test_merged_and_disabled_adapters_of_a_head(calls):
    model, ids = with_lora(tiny_decoder("Llama")).eval(), tokens()
    base = model.get_base_model()
    plain = base(ids, labels=ids).loss
    with model.disable_adapter():
        disabled = base(ids, labels=ids).loss
    qk.fuse_model(base, attention=False)
    with model.disable_adapter():
        assert_same_function(base(ids, labels=ids, skip_logits=True).loss, disabled)
    model.merge_adapter()
    assert_same_function(base(ids, labels=ids, skip_logits=True).loss, plain)
    assert calls == ["linear_cross_entropy"] * 2


def test_adapters_train_on_the_fused_loss(calls):
    model, ids = tiny_decoder("Llama"), tokens()
    config = qk.peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = qk.peft.get_peft_model(model, config)
    plain = step(adapted, ids)
    qk.fuse_model(adapted)
    assert_same_step(step(adapted, ids), plain)
    assert "linear_cross_entropy" in calls


def test_signature_and_generation_stay():
    model, ids = tiny_decoder("Qwen3"), tokens(rows=1)
    signature = inspect.signature(model.forward)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    qk.fuse_model(model)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)


def test_gradient_checkpointing():
    model, ids = tiny_decoder("Llama"), tokens()
    plain = step(model, ids)
    qk.fuse_model(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(step(model, ids), plain)
