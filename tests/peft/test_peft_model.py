"""Several adapters on one model: selection, per-row batches, merging, disabling, counting, files."""

from __future__ import annotations

import json

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function, assert_same_gradients, model_error

from .adapter_pairs import FORMATS, assert_rows_use_their_adapters, two_adapters


def test_only_active_adapters_train():
    model = two_adapters()
    for active in ("default", "b", ["default", "b"]):
        model.set_adapter(active)
        training = {name.split(".")[0] for name, p in model.adapters.named_parameters() if p.requires_grad}
        assert training == {active} if isinstance(active, str) else set(active)


@FORMATS
def test_active_adapters_add_up(nf4):
    model, inputs = two_adapters(nf4), batch("llama")
    model.set_adapter(["default", "b"])
    both = logits(model, inputs)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    assert_same_function(logits(model, inputs), both)


@FORMATS
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_use_their_adapters(kind, nf4):
    model, inputs = two_adapters(nf4, kind), batch(kind, rows=4)
    names = ["b", "__base__", "default", "b"]
    assert_rows_use_their_adapters(model, inputs, names)


@FORMATS
def test_rows_train(nf4):
    model, inputs = two_adapters(nf4), batch("llama", rows=2)
    model.set_adapter(["default", "b"])
    model.train()
    logits(model, inputs, adapter_names=["__base__", "b"]).square().sum().backward()
    grads = {name: [p.grad for p in model.adapters[name].parameters()] for name in ("default", "b")}
    assert all(g is None or not g.any() for g in grads["default"])
    assert any(g is not None and g.any() for g in grads["b"])


def test_rows_generate_with_beams():
    model, inputs = two_adapters(), batch("llama", rows=3)
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    mixed = model.generate(**inputs, adapter_names=["default", "b", "__base__"], **options)
    model.set_adapter("b")
    alone = model.generate(**{k: v[1:2] for k, v in inputs.items()}, **options)
    assert torch.equal(mixed[1:2], alone)


def test_rows_are_checked():
    model, inputs = two_adapters(), batch("llama")
    with pytest.raises(ValueError, match="one per row"):
        model(**inputs, adapter_names=["b", "default"])
    with pytest.raises(ValueError, match="must be one of"):
        model(**inputs, adapter_names=["b", "c", "b"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(**inputs, adapter_names=["b", "b", "b"])


def test_rows_refuse_an_adapter_that_replaces_parameters():
    model = get_peft_model(make("bert"), LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"classifier.* for the whole batch"):
        model(**batch("bert"), adapter_names=["default"] * 3)


@FORMATS
def test_disable_gives_the_base(nf4):
    inputs = batch("llama")
    before = logits(make("llama", nf4=nf4), inputs)
    model = two_adapters(nf4)
    with model.disable_adapter():
        assert_same_function(logits(model, inputs), before)
    assert (logits(model, inputs) - before).abs().max() > 10 * model_error() * before.abs().max()
    model.merge_adapter()
    merged = logits(model, inputs)
    with model.disable_adapter():
        assert_same_function(logits(model, inputs), before)
    assert_same_function(logits(model, inputs), merged)


@pytest.mark.parametrize(
    "how",
    [
        *("cat", "linear", "magnitude_prune", "ties", "ties-frequency", "dare_linear", "dare_ties"),
        *("svd", "magnitude_prune_svd", "ties_svd", "dare_linear_svd", "dare_ties_svd"),
    ],
)
def test_weighted_combination_equals_peft(hf_peft, tmp_path, how, monkeypatch):
    """Also with a negative weight. DARE's random mask is made equal for both, which store embeddings transposed."""
    monkeypatch.setattr(
        torch,
        "bernoulli",
        lambda p: (sum(map(torch.arange, p.shape[1:]), torch.arange(p.shape[0])[:, None]) % 3 > 0).to(p.dtype),
    )
    how, _, method = how.partition("-")
    pruning = {} if how in ("cat", "linear", "svd") else {"density": 0.6}
    signs = {"majority_sign_method": method} if method else {}
    inputs = batch("llama")
    targets = ["q_proj", "up_proj", "embed_tokens"]
    model = get_peft_model(make("llama"), LoraConfig(target_modules=targets, r=4))
    model.add_adapter("b", LoraConfig(target_modules=targets, r=4, lora_alpha=3))
    for i, name in enumerate(("b", "default")):
        model.set_adapter(name)
        randomize(model, seed=i)
    model.save_pretrained(tmp_path)
    theirs = hf_peft.PeftModel.from_pretrained(make("llama"), tmp_path)
    theirs.load_adapter(str(tmp_path / "b"), "b")
    for m in (model, theirs):
        m.add_weighted_adapter(["default", "b"], [0.7, -0.4], "c", combination_type=how, **pruning, **signs)
        m.set_adapter("c")
    assert_same_function(logits(model.eval(), inputs), logits(theirs.eval(), inputs))


def test_weighted_combinations_are_checked():
    model = two_adapters()
    for message, options in (
        ("combination_type must be one of", {"combination_type": "mean"}),
        (r"density must lie in \(0, 1\] for 'ties'", {"combination_type": "ties"}),
        ("majority_sign_method", {"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}),
        (r"must be equal for 'linear', got \[4, 2\]", {"combination_type": "linear"}),
        ("weights must be one per adapter", {"weights": [1.0]}),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(["default", "b"], **{"weights": [1.0, 1.0], "adapter_name": "c", **options})


@FORMATS
def test_count_printed(hf_peft, capsys, nf4):
    model = get_peft_model(make("llama", nf4=nf4), LoraConfig(target_modules="all-linear"))
    model.print_trainable_parameters()
    ours = capsys.readouterr().out
    hf_peft.get_peft_model(make("llama"), hf_peft.LoraConfig(target_modules="all-linear")).print_trainable_parameters()
    assert ours == capsys.readouterr().out


def test_delete_and_unload_leave_the_model_as_it_was():
    base, inputs = make("llama"), batch("llama")
    before, state = logits(base, inputs), {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    model.delete_adapter("b")
    assert list(model.peft_config) == ["default"]
    with pytest.raises(KeyError, match=r"must be an adapter of this model, one of \['default'\], got 'b'"):
        model.peft_config["b"]
    assert model.unload() is base
    assert_same_function(logits(base, inputs), before)
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.state_dict().items())


def test_modules_to_save_belong_to_adapter(tmp_path):
    base, inputs = make("bert"), batch("bert")
    before = logits(base, inputs)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", modules_to_save=["pooler"]))
    randomize(model)
    after = logits(model, inputs)
    with model.disable_adapter():
        assert_same_function(logits(model, inputs), before)
    assert_same_function(logits(model, inputs), after)
    model.save_pretrained(tmp_path)
    assert_same_function(logits(PeftModel.from_pretrained(make("bert"), tmp_path), inputs), after)
    merged = model.merge_and_unload()
    assert_same_function(logits(merged, inputs), after)


def test_quantized_modules_cannot_be_trained_in_full():
    with pytest.raises(ValueError, match="must not be quantized"):
        get_peft_model(make("bert", nf4=True), LoraConfig(target_modules=["query"], modules_to_save=["pooler"]))


@FORMATS
def test_save_and_load_are_bit_exact(tmp_path, nf4):
    model, inputs = two_adapters(nf4), batch("llama")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama", nf4=nf4), tmp_path)
    again.load_adapter(tmp_path / "b", "b")
    assert not any(p.requires_grad for p in again.parameters())
    for name in ("default", "b"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert_same_function(logits(again, inputs), logits(model, inputs))
    expected, loaded = (dict(m.adapters.named_parameters()) for m in (model, again))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())


def test_an_adapter_loaded_for_use_is_in_eval_mode(tmp_path):
    """Also if the base was in training mode; two calls agree although the adapter has dropout."""
    config = LoraConfig(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    inputs = batch("llama")
    model = PeftModel.from_pretrained(make("llama").train(), tmp_path)
    assert not any(module.training for module in model.modules())
    assert_same_function(logits(model, inputs), logits(model, inputs))
    model.train().load_adapter(tmp_path, "second")
    assert not any(module.training for module in model.modules())
    trainable = PeftModel.from_pretrained(make("llama").train(), tmp_path, is_trainable=True)
    assert all(module.training for module in trainable.modules())


def test_files_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json must exist"):
        PeftModel.from_pretrained(make("llama"), tmp_path)
    get_peft_model(make("llama"), LoraConfig(r=4)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    with pytest.raises(ValueError, match=r"rank of .*q_proj must be that of its tensors, of shape \[4, 32\], got 5"):
        PeftModel.from_pretrained(make("llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "XLORA"}))
    with pytest.raises(ValueError, match="peft_type must be one of"):
        PeftModel.from_pretrained(make("llama"), tmp_path)


def test_a_failed_load_leaves_no_adapter(tmp_path):
    model = two_adapters()
    layers = set(model.injector.adapted_layers())
    with pytest.raises(FileNotFoundError):
        model.load_adapter(tmp_path, "c")
    with pytest.raises(ValueError, match="matches no module"):
        model.add_adapter("c", LoraConfig(target_modules=["nothing"]))
    assert list(model.adapters) == ["default", "b"]
    assert set(model.injector.adapted_layers()) == layers


def test_explain():
    model = two_adapters(nf4=True)
    assert set(model.explain().values()) == {"fused"}
    model.merge_adapter()
    assert all("merged" in reason for reason in model.explain().values())
    assert all("no forward_lora" in reason for reason in two_adapters().explain().values())


@FORMATS
def test_compiles(nf4):
    model, inputs = two_adapters(nf4), batch("llama")
    model.set_adapter(["default", "b"])
    expected = logits(model, inputs)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_function(logits(compiled, inputs), expected)


@pytest.mark.parametrize("how", ["non_reentrant", "reentrant"])
def test_gradient_checkpointing(how):
    inputs = {**batch("llama", rows=2), "labels": batch("llama", rows=2)["input_ids"]}
    grads = []
    for checkpointing in (False, how):
        model = two_adapters(nf4=True)
        qk.peft.prepare_for_training(model.base_model, gradient_checkpointing=checkpointing)
        model.set_adapter(["default", "b"])
        model.train()
        model(**inputs, adapter_names=["b", "default"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_same_gradients(grads[1], grads[0])


def test_lora_plus_groups():
    model = two_adapters()
    model.set_adapter("default")
    groups = qk.peft.lora_plus_groups(model, lr=1e-3, ratio=16, weight_decay=0.1)
    lora_B = {id(p) for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n}
    for group in groups:
        assert {id(p) in lora_B for p in group["params"]} == {group["lr"] > 1e-3}
        assert group["lr"] in (1e-3, 16e-3)
    with pytest.raises(ValueError, match="must train a lora_B"):
        qk.peft.lora_plus_groups(make("llama"), lr=1e-3, ratio=16)


def test_lora_plus_rates_and_decay_by_kind_of_parameter():
    model = get_peft_model(make("gpt2"), LoraConfig(target_modules=["wte", "c_attn"], bias="all"))
    groups = qk.peft.lora_plus_groups(model, lr=1e-3, ratio=16, weight_decay=0.1, embedding_lr=1e-5)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(trained)
    expected = {
        "lora_embedding_A": (1e-5, 0.1),
        "lora_embedding_B": (1e-5, 0.1),
        "lora_A": (1e-3, 0.1),
        "lora_B": (16e-3, 0.1),
    }
    for name, parameter in trained.items():
        kind = next((part for part in name.split(".") if part in expected), "bias")
        assert found[id(parameter)] == {**expected, "bias": (1e-3, 0.0)}[kind], name
