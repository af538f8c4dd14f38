"""A fused model generates, checkpoints, compiles, saves and carries adapters; unknown modules are left alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import qlora_kernels as qk
from qlora_kernels.nn import fused_attention, fused_mlp, fused_norm
from qlora_kernels.nn.fused_attention import AttentionForm
from tests.peft.cases import build
from tests.peft.models import batch, logits, make, randomize
from tests.support.decoder_families import FAMILIES, loss_and_gradients, tiny_decoder, tokens
from tests.support.tolerances import assert_same_function, assert_same_gradients, model_error

families = pytest.mark.parametrize("family", FAMILIES)
METHODS = ("lora", "dora", "bitfit", "houlsby", "pfeiffer", "parallel", "prefix_tuning", "mam", "unipelt")


def fused(model):
    """Return a fused copy of the model."""
    other = copy.deepcopy(model)
    assert qk.fuse_model(other).replaced
    return other


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_16_bit_logits_are_those_of_the_model(family, dtype):
    model, ids = tiny_decoder(family, dtype=dtype), tokens()
    assert_same_function(fused(model)(ids).logits, model(ids).logits, products=14)


@families
def test_generate_with_a_cache(family):
    model, ids = tiny_decoder(family), tokens(rows=2, length=5)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(fused(model).generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Gemma2", "Gemma3"])
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_masks_and_positions(family, kind):
    """Left-padded rows, and two texts in a row, the second of which starts at position 0 again."""
    model, ids = tiny_decoder(family, sliding_window=4), tokens(rows=2, length=9)
    mask = torch.ones_like(ids)
    if kind == "padded":
        mask[0, :3] = 0
        inputs = {"attention_mask": mask}
    else:
        inputs = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)}
    expected, actual = model(ids, **inputs).logits, fused(model)(ids, **inputs).logits
    seen = mask.bool() if kind == "padded" else torch.ones_like(mask).bool()
    assert_same_function(actual[seen], expected[seen])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant):
    model, ids = tiny_decoder("Gemma2").train(), tokens()
    _, gradients = loss_and_gradients(model, ids)
    other = fused(model)
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    other.enable_input_require_grads()
    assert_same_gradients(loss_and_gradients(other, ids)[1], gradients)


def test_compile_has_no_additional_graph_breaks():
    model, ids = tiny_decoder("Qwen3"), tokens()

    def breaks(candidate):
        torch._dynamo.reset()
        return torch._dynamo.explain(lambda x: candidate(x, use_cache=False).logits)(ids).graph_break_count

    other = fused(model)
    assert breaks(other) == breaks(model)
    compiled = torch.compile(lambda x: other(x, use_cache=False).logits, backend="aot_eager")
    assert_same_function(compiled(ids), model(ids).logits)


def test_files_are_those_of_the_plain_model(tmp_path):
    model, ids = tiny_decoder("Llama"), tokens()
    fused(model).save_pretrained(tmp_path / "fused")
    model.save_pretrained(tmp_path / "plain")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert_same_function(type(model).from_pretrained(tmp_path / "fused")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_before_and_after(method, nf4):
    """With fusing below or around the adapters, outputs and gradients equal those of the plain model with adapters."""
    plain = build(method, "llama", nf4=nf4)
    randomize(plain)
    after = copy.deepcopy(plain)
    assert qk.fuse_model(after).replaced
    before = qk.peft.get_peft_model(_fused_base(nf4), plain.peft_config["default"]).eval()
    before.load_state_dict(plain.state_dict())
    inputs = batch("llama")
    expected = logits(plain, inputs)
    gradients = _gradients(plain, expected)
    for other in (after, before):
        actual = logits(other, inputs)
        assert_same_function(actual, expected)
        assert_same_gradients(_gradients(other, actual), gradients)


def _fused_base(nf4):
    base = make("llama", nf4=nf4).requires_grad_(False)
    assert qk.fuse_model(base).replaced
    return base


def _gradients(model, y):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y.square().mean(), list(trained.values()), allow_unused=True)
    return {name: grad for name, grad in zip(trained, grads, strict=True) if grad is not None}


def test_overridden_norms_are_pickled_and_unfused():
    """BitFit and full fine-tuning put a made class over or under that of fuse_model."""
    model = qk.peft.get_peft_model(_fused_base(False), qk.peft.FullFTConfig(modules_to_save=None)).eval()
    inputs = batch("llama")
    expected = logits(model, inputs)
    other = pickle.loads(pickle.dumps(model))
    assert_same_function(logits(other, inputs), expected)
    assert qk.unfuse_model(other)
    assert_same_function(logits(other, inputs), expected)
    assert qk.unfuse_model(other) == []


def test_hooks_on_norms_and_layers_are_called():
    """A hook on the norm after the residual addition receives that norm's input and may change its output."""
    model, ids = tiny_decoder("Llama"), tokens()
    other = fused(model)
    results = []
    for candidate in (model, other):
        seen = []
        norm = candidate.model.layers[0].post_attention_layernorm
        norm.register_forward_hook(lambda module, args, y, seen=seen: (seen.append(args[0]), y * 2)[1])
        results.append((candidate(ids).logits, seen[0]))
    assert_same_function(results[1][0], results[0][0])
    assert_same_function(results[1][1], results[0][1])


def test_autocast_and_double_precision():
    model, ids = tiny_decoder("Qwen3"), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_function(fused(model)(ids).logits, model(ids).logits, products=14)
    double = tiny_decoder("Gemma", dtype=torch.float64)
    expected = double(ids).logits
    in_double = model_error() * 2.0**-29  # the ratio of the unit roundoffs of float64 and float32
    error = in_double * expected.abs().max().item()
    torch.testing.assert_close(fused(double)(ids).logits, expected, rtol=0, atol=error)


class HalvedNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) / 2


class OtherSquares(GemmaRMSNorm):
    def _norm(self, x):
        return x


class PlainSubclass(LlamaRMSNorm):
    """A subclass that overrides nothing."""


def test_unknown_modules_are_skipped_with_reason():
    unknown = "the code of its forward is not one of the known forms"
    model = tiny_decoder("Llama", hidden_act="gelu")
    model.model.norm = HalvedNorm(32)
    model.model.layers[0].input_layernorm = OtherSquares(32)
    model.model.layers[1].input_layernorm = PlainSubclass(32)
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward
    expected = model(tokens()).logits
    report = qk.fuse_model(model)
    assert report.skipped == {
        "model.layers.0.input_layernorm": unknown,
        "model.layers.0.mlp": "its activation is GELUActivation, not SiLU or GELUTanh",
        "model.layers.1.mlp": "its activation is GELUActivation, not SiLU or GELUTanh",
        "model.layers.1.self_attn": "a forward was set on the module itself, as accelerate's hooks and kernelize() do",
        "model.norm": unknown,
    }
    assert "model.layers.1.input_layernorm" in report.replaced
    assert "kept: " in str(report)
    assert_same_function(model(tokens()).logits, expected)


OTHER_FAMILIES = {
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},  # attention sinks
    "Phi3": {},  # one projection for q, k and v
    "Olmo2": {},  # norms of whole q and k
    "Cohere2": {"sliding_window": 4},  # scaled logits, interleaved rotary embedding
    "Granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "Glm4": {},  # rotary embedding of half of each head
    "Qwen2Moe": {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1},
}
"""Models with what no fused part computes -> their settings."""


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_keep_loss_and_gradients(family):
    """Parts whose code is known are fused, all others are named; a padded batch."""
    model, ids = tiny_decoder(family, **OTHER_FAMILIES[family]).train(), tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def loss_and_grads():
        model.zero_grad()
        loss = model(ids, **inputs).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, gradients = loss_and_grads()
    report = qk.fuse_model(model)
    assert report.skipped
    fused_loss, fused_gradients = loss_and_grads()
    assert_same_function(fused_loss, loss)
    assert_same_gradients(fused_gradients, gradients)


def test_parts_selectable_and_other_models_unchanged():
    model = tiny_decoder("Llama")
    report = qk.fuse_model(model, norms=False, rope=False, attention=False, loss=False)
    assert set(report.replaced.values()) == {"FusedMLP"}
    report = qk.fuse_model(model, norms=False, mlp=False, attention=False, loss=False)
    assert set(report.replaced.values()) == {"FusedRotation"}
    assert qk.fuse_model(make("bert")).replaced == {}
    assert qk.fuse_model(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))).replaced == {}


def assert_unchanged(actual, values, actual_gradients, gradients):
    assert_same_function(actual, values)
    assert_same_gradients(actual_gradients, gradients)


def _without_offset(x, weight, eps, *, residual=None, weight_offset=0.0):
    return qk.rms_norm(x, weight, eps, residual=residual)


def _without_residual(x, weight, eps, *, residual=None, weight_offset=0.0):
    y, s = qk.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset)
    return y, s if residual is None else x


def _with_detached_sum(x, weight, eps, *, residual=None, weight_offset=0.0):
    y, s = qk.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset)
    return y, s.detach()


PLANTED = {
    "the norm's offset is lost": ("Gemma", fused_norm, "rms_norm", _without_offset),
    "the residual is lost": ("Llama", fused_norm, "rms_norm", _without_residual),
    "the sum has no gradient": ("Llama", fused_norm, "rms_norm", _with_detached_sum),
    "k is not rotated": ("Mistral", fused_attention, "rope", lambda q, k, c, s: (qk.rope(q, k, c, s)[0], k)),
    "the rotation is reversed": ("Qwen2", fused_attention, "rope", lambda q, k, c, s: qk.rope(q, k, c, -s)),
    "the other activation": ("Gemma2", fused_mlp, "glu", lambda g, u, a: qk.glu(g, u, "silu")),
    "gate and up are exchanged": ("Llama", fused_mlp, "glu", lambda g, u, a: qk.glu(u, g, a)),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_detected(fault, monkeypatch):
    family, module, name, faulty = PLANTED[fault]
    model, ids = tiny_decoder(family), tokens()
    values, gradients = loss_and_gradients(model, ids)
    monkeypatch.setattr(module, name, faulty)
    actual, actual_gradients = loss_and_gradients(fused(model), ids)
    with pytest.raises(AssertionError):
        assert_unchanged(actual, values, actual_gradients, gradients)


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3", "Qwen3"])
def test_missing_attention_argument_is_detected(family, monkeypatch):
    """Caps and norms of heads are part of a family's form; the form of another family changes outputs."""
    model, ids = tiny_decoder(family, initializer_range=1.0, attn_logit_softcapping=0.1), tokens()
    model.config._attn_implementation = "eager"
    expected = model(ids).logits
    assert_same_function(fused(model)(ids).logits, expected)
    other = fused(model)
    for module in other.modules():
        if isinstance(module, fused_attention.FusedAttention):
            monkeypatch.setattr(type(module), "form", AttentionForm())
    with pytest.raises(AssertionError):
        assert_same_function(other(ids).logits, expected)
