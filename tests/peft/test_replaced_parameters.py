"""Parameters that are replaced, resized, cast or offloaded after an adapter was added: the adapter follows by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from tests.peft.cases import build
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function


def saved(model: PeftModel, path) -> torch.Tensor:
    """Return the outputs of a new base with the file that the model writes."""
    model.save_pretrained(path)
    return logits(PeftModel.from_pretrained(make("llama"), path), batch("llama"))


def with_copies() -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], bias="all")
    model = get_peft_model(make("llama"), config)
    randomize(model)
    return model.eval()


@pytest.mark.parametrize(
    "change", ["load_state_dict", "assign", "to_empty", "overwrite", "swap", "float64", "parametrize", "weight_norm"]
)
def test_saved_file_follows_replaced_parameters(change, tmp_path):
    model = with_copies()
    base = logits(make("llama"), batch("llama"))
    state = {key: value.clone() for key, value in with_copies().state_dict().items()}
    for key in state:
        if "overrides" in key or "lora" in key:
            state[key] += 0.05
    if change in ("load_state_dict", "assign"):
        model.load_state_dict(state, assign=change == "assign")
    elif change == "to_empty":
        model.to_empty(device="cpu").load_state_dict(state)
        for ours, theirs in zip(model.base_model.buffers(), make("llama").buffers(), strict=True):
            ours.copy_(theirs)  # state dicts do not include them
    elif change in ("overwrite", "swap"):
        setter = getattr(
            torch.__future__,
            f"set_{change}_module_params_on_conversion",
        )
        setter(True)
        try:
            model.double().float()
        finally:
            setter(False)
    elif change == "float64":
        model.double().float()
    elif change == "parametrize":
        parametrize.register_parametrization(model.base_model.lm_head, "weight", Doubled())
        parametrize.register_parametrization(
            model.injector.adapted_layers()["model.layers.0.self_attn.q_proj"].deltas["default"].lora_A,
            "weight",
            Doubled(),
        )
    else:
        nn.utils.parametrizations.weight_norm(model.base_model.lm_head)
        randomize(model)
    expected = logits(model, batch("llama"))
    assert_same_function(saved(model, tmp_path), expected)
    if change not in ("parametrize", "weight_norm"):
        with model.disable_adapter():
            assert_same_function(logits(model, batch("llama")), base)
        # Training continues with the values that are in the model now.
        randomize(model, seed=7)
        assert not torch.equal(logits(model, batch("llama")), expected)
        assert_same_function(saved(model, tmp_path), logits(model, batch("llama")))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resized_embeddings(tmp_path, dtype):
    """Trained rows are kept, base and copies grow by the same rows, and the file fits a base of the new size."""
    model = with_copies().to(dtype)
    plain = logits(model, batch("llama"))
    assert model.resize_token_embeddings(51, mean_resizing=False) is model.base_model.get_input_embeddings()
    assert model.get_input_embeddings().weight.shape[0] == model.base_model.lm_head.weight.shape[0] == 51
    assert_same_function(logits(model, batch("llama"))[..., :48], plain)
    ids = torch.tensor([[1, 48, 50]])
    with model.disable_adapter():
        assert model(input_ids=ids).logits.shape[-1] == 51
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "overrides" in n}
    assert {p.shape[0] for n, p in trained.items() if "weight" in n} == {51}
    randomize(model)
    model.save_pretrained(tmp_path)
    base = make("llama").to(dtype)
    base.resize_token_embeddings(51, mean_resizing=False)
    again = PeftModel.from_pretrained(base, tmp_path, adapter_dtype=torch.float32)
    # The factors of a bf16 model were cast to bf16 here and are fp32 there: one more rounding in each product.
    assert_same_function(again(input_ids=ids).logits, model(input_ids=ids).logits, products=20)


def test_new_rows_are_warned_of_unless_they_train(tmp_path):
    base = make("llama")
    base.resize_token_embeddings(51, mean_resizing=False)
    with pytest.warns(UserWarning, match=r"embeddings have 51 rows, those of the base model 48, .*modules_to_save"):
        get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        base = make("llama")
        base.resize_token_embeddings(51, mean_resizing=False)
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        get_peft_model(base, config).save_pretrained(tmp_path)


def test_a_missed_step_is_noticed_after_parameters_were_replaced(tmp_path):
    model = build("adalora", "llama")
    model = copy.deepcopy(model).train()
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    (logits(model, batch("llama")).sum() + model.peft_loss()).backward()
    with pytest.raises(RuntimeError, match="must be called after every backward"):
        model.save_pretrained(tmp_path)
    model.step(1)
    model.save_pretrained(tmp_path)
    (logits(model, batch("llama")).sum() + model.peft_loss()).backward()
    model.step(2)
    method = model.adapters["default"][0]
    assert {id(weight) for weight in method.allocator.weights} == {id(p) for p in method.parameters()}


def test_a_fused_sibling_may_be_replaced():
    model = get_peft_model(make("llama", nf4=True), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    plain = copy.deepcopy(model)
    qk.fuse_shared_input(model)
    for each in (model, plain):
        each.base_model.model.layers[0].self_attn.k_proj = copy.deepcopy(
            model.base_model.model.layers[1].self_attn.k_proj
        )
    with torch.no_grad():
        assert_same_function(logits(model.eval(), batch("llama")), logits(plain.eval(), batch("llama")))


def test_resizing_under_a_lora_is_refused():
    model = get_peft_model(make("llama"), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match=r"resize_token_embeddings: model.embed_tokens must have no LoRA"):
        model.resize_token_embeddings(51)
    assert model.get_input_embeddings().weight.shape[0] == 48


def test_half_precision_copies_have_fp32_masters():
    """Trained parameters are fp32 and used in the model's dtype, so that fp16 training with a GradScaler works."""
    base = make("llama").half()
    inputs = batch("llama")
    before = logits(base, inputs)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert_same_function(logits(model, inputs), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    with torch.autocast("cpu", torch.float16):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert not torch.equal(logits(model, inputs), before)
    trained = logits(model, inputs)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.float16}
    assert_same_function(logits(merged, inputs), trained)


def test_merged_layers_follow_a_cast():
    model = get_peft_model(make("llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    model.merge_adapter()
    model.bfloat16()
    assert logits(model, batch("llama")).dtype == torch.bfloat16
    with model.disable_adapter():
        assert logits(model, batch("llama")).dtype == torch.bfloat16
    model.unmerge_adapter()
    assert logits(model, batch("llama")).dtype == torch.bfloat16


def test_offloaded_weights_are_loaded():
    accelerate = pytest.importorskip("accelerate")
    for case in ("lora", "dora", "adalora", "prefix_tuning", "pfeiffer", "bitfit"):
        model, inputs = build(case, "llama", nf4=True, layers=1), batch("llama", rows=2)
        randomize(model)
        expected = logits(model, inputs)
        accelerate.cpu_offload(model.base_model, "cpu")
        with torch.no_grad():
            assert_same_function(logits(model, inputs), expected, case)
