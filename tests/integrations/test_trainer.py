"""Our PeftModel in transformers' Trainer and in TRL's SFTTrainer and DPOTrainer, unchanged."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import qlora_kernels as qk
from tests.support.tiny_model import write_tiny_llama
from tests.support.tolerances import assert_same_function

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from .tiny_models import build, logits  # noqa: E402

ROWS = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i, "id": i} for i in range(8)]
"""With a column that the model's forward does not take."""


def adapted(kind="tied", **options):
    model = build(kind)
    qk.replace_linear(model)
    torch.manual_seed(1)
    options.setdefault("target_modules", "all-linear")
    return qk.peft.get_peft_model(model, qk.peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))


def trainer(model, folder, **options):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 2,
        "eval_strategy": "steps",
    }
    callbacks, rows = options.pop("callbacks", None), options.pop("rows", ROWS)
    arguments = transformers.TrainingArguments(**{**settings, **options})
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(trainer after four steps over a model with a tied head, its folder)."""
    folder = tmp_path_factory.mktemp("run")
    ours = trainer(adapted(), folder)
    ours.train()
    return ours, folder


def test_is_instance_of_hugging_face_peft_model():
    model = adapted()
    assert isinstance(model, (peft.PeftModel, qk.peft.PeftModel))
    assert type(model) is qk.peft.PeftModel
    assert isinstance(copy.deepcopy(model), peft.PeftModel)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert type(again) is qk.peft.PeftModel
    assert torch.equal(logits(again), logits(model))


def test_attributes_of_the_base_model(tmp_path):
    model = adapted()
    base = model.get_base_model()
    for name in ("config", "dtype", "device", "generation_config", "main_input_name"):
        assert getattr(model, name) is getattr(base, name) or getattr(model, name) == getattr(base, name)
    assert model.get_input_embeddings() is base.get_input_embeddings()
    model.add_model_tags(["a tag"])
    assert base.model_tags == ["a tag"]
    assert not getattr(model, "is_quantized", False)
    base.hf_device_map = {"": "cpu"}
    assert model.hf_device_map == {"": "cpu"}


def test_losses_and_adapter_only_checkpoints(run):
    ours, folder = run
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert ours.label_names == ["labels"]
    assert "eval_loss" in ours.evaluate()
    names = {path.name for path in (folder / "checkpoint-4").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= names
    assert not any(name.startswith(("model", "pytorch_model")) for name in names)


def test_resumed_run_ends_with_the_same_values(run, tmp_path):
    ours, folder = run
    resumed = trainer(adapted(), tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    expected = values(ours.model)
    assert all(torch.equal(value, expected[name]) for name, value in values(resumed.model).items())


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 5]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True},
    ],
    ids=["both", "tying", "tokens", "lora"],
)
def test_checkpoints_of_tied_embeddings(options, tmp_path):
    """Trained copies, rows and updates of a tied embedding and head are in each checkpoint, which PEFT loads too."""
    from qlora_kernels.integrations.peft import register

    register()
    ours, resumed = (trainer(adapted(**options), tmp_path / name) for name in "ab")
    ours.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    expected = values(ours.model)
    assert any("embed_tokens" in name for name in expected)
    assert all(torch.equal(value, expected[name]) for name, value in values(resumed.model).items())
    base = adapted().unload()
    for load in (qk.peft.PeftModel.from_pretrained, peft.PeftModel.from_pretrained):
        again = load(copy.deepcopy(base), tmp_path / "a" / "checkpoint-4")
        assert_same_function(logits(again), logits(ours.model.eval()))


def test_best_model_is_loaded_and_training_stops_early(tmp_path):
    """The learning rate is far too large, so the first evaluation is the best."""
    ours = trainer(
        adapted(lora_alpha=64),
        tmp_path,
        learning_rate=3.0,
        max_steps=8,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_total_limit=1,
    )
    ours.add_callback(transformers.EarlyStoppingCallback(early_stopping_patience=1))
    ours.train()
    assert ours.state.global_step == 4
    assert ours.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = qk.peft.PeftModel.from_pretrained(adapted().unload(), ours.state.best_model_checkpoint)
    assert torch.equal(logits(ours.model.eval()), logits(saved))
    assert values(ours.model)


def test_trainer_over_a_model_that_transformers_quantized(tmp_path):
    from qlora_kernels.integrations.transformers import QLoRAKernelsConfig

    build("tied").save_pretrained(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=QLoRAKernelsConfig()
    )
    config = qk.peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ours = trainer(qk.peft.get_peft_model(model, config), tmp_path / "run", max_steps=1, eval_strategy="no")
    assert ours.train().global_step == 1


def test_load_adapter_refuses_another_configuration(tmp_path):
    adapted().save_pretrained(tmp_path)
    other = adapted(lora_alpha=3)
    with pytest.raises(ValueError, match=r"same configuration.*lora_alpha"):
        other.load_adapter(tmp_path)


def test_save_options(tmp_path):
    """Values that the Trainer has gathered are saved in place of the model's own, which stay."""
    model = adapted()
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gathered = {name: p.detach() + 1 for name, p in own.items()}
    name = next(iter(gathered))
    with pytest.raises(ValueError, match=rf"state_dict: {name} must be the whole tensor, of shape .*, got the shape"):
        model.save_pretrained(tmp_path, state_dict={**gathered, name: gathered[name][:1]})
    model.save_pretrained(tmp_path / "ignored", state_dict=gathered, is_main_process=False)
    assert not (tmp_path / "ignored").exists()
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert all(p is own[name] for name, p in model.named_parameters() if p.requires_grad)
    reloaded = qk.peft.PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)
    assert all(torch.equal(dict(reloaded.named_parameters())[name], value) for name, value in gathered.items())


def test_functions_of_peft_copy_adapters():
    """They take models of both packages: TRL copies adapters with them, and accelerate saves shards."""
    model = adapted(modules_to_save=["norm"])
    model.add_adapter("second", model.peft_config["default"])
    assert isinstance(model, peft.PeftModel)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1
    state = peft.get_peft_model_state_dict(model)
    peft.set_peft_model_state_dict(model, state, adapter_name="second")
    copied = peft.get_peft_model_state_dict(model, adapter_name="second")
    assert copied.keys() == state.keys()
    assert any("norm" in name for name in state), list(state)
    assert all(torch.equal(copied[name], value) for name, value in state.items())
    state.popitem()
    with pytest.raises(ValueError, match="must hold the parameters of adapter 'default' and no others"):
        peft.set_peft_model_state_dict(model, state)
    theirs = peft.get_peft_model(build("tied"), peft.LoraConfig(target_modules=["q_proj"]))
    assert not peft.set_peft_model_state_dict(theirs, peft.get_peft_model_state_dict(theirs)).unexpected_keys


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A folder with a tiny model and a tokenizer that has a chat template."""
    return write_tiny_llama(tmp_path_factory.mktemp("chat"), dtype=torch.float32)


def trl_parts(folder, targets="all-linear"):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    qk.replace_linear(model)
    torch.manual_seed(1)
    config = qk.peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    return qk.peft.get_peft_model(model, config), transformers.AutoTokenizer.from_pretrained(folder)


TRL_SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def test_sft_trainer(chat_model, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, tokenizer = trl_parts(chat_model)
    chats = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(4)]
    rows = datasets.Dataset.from_list([{"messages": chat} for chat in chats])
    arguments = trl.SFTConfig(output_dir=str(tmp_path), save_steps=2, **TRL_SETTINGS)
    ours = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    before = values(model)
    ours.train()
    assert any(not torch.equal(value, before[name]) for name, value in values(model).items())
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


@pytest.mark.parametrize("initial", ["new", "trained", "head"])
def test_dpo_trainer_starts_at_its_reference(initial, chat_model, tmp_path):
    """The reference is the adapter as it was given, or the base model: the first loss is ln 2, the margin 0.

    TRL multiplies by the head's weight itself, also where the head has an adapter ("head").
    """
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, tokenizer = trl_parts(chat_model, ["lm_head"] if initial == "head" else "all-linear")
    before = values(model)
    if initial == "trained":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    rows = datasets.Dataset.from_list([{"prompt": f"{i}", "chosen": " yes", "rejected": " no"} for i in range(4)])
    arguments = trl.DPOConfig(output_dir=str(tmp_path), save_strategy="no", **TRL_SETTINGS)
    ours = trl.DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    ours.train()
    first, second = ours.state.log_history[:2]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert second["loss"] < first["loss"]
    assert model.active_adapters == ["default"]
    assert all(not torch.equal(value, before[name]) for name, value in values(model).items() if ".default." in name)


@pytest.mark.parametrize("name", ["KTO", "GRPO", "RLOO", "Reward"])
def test_other_trainers_of_trl(name, chat_model, tmp_path):
    """Each trains the adapter and writes checkpoints of the adapter alone."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    if name == "Reward":
        base = transformers.AutoModelForSequenceClassification.from_pretrained(chat_model, num_labels=1)
        qk.replace_linear(base, skip=("score",))
        model = qk.peft.get_peft_model(base, qk.peft.LoraConfig(r=4, target_modules=["v_proj"], task_type="SEQ_CLS"))
    else:
        model = trl_parts(chat_model)[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    pairs = [{"prompt": f"{i}", "chosen": " yes", "rejected": " no"} for i in range(4)]
    labelled = [{"prompt": f"{i}", "completion": " yes", "label": i % 2 == 0} for i in range(4)]
    rows = {"KTO": labelled, "Reward": pairs}.get(name, [{"prompt": f"{i}"} for i in range(4)])
    options = {**TRL_SETTINGS, "max_steps": 1, "save_steps": 1, "output_dir": str(tmp_path)}
    arguments = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    if name in ("GRPO", "RLOO"):
        options |= {"num_generations": 2, "max_completion_length": 4, "temperature": 1.5}
        arguments["reward_funcs"] = lambda completions, **_: [float(hash(text) % 7) for text in completions]
    before = values(model)
    getattr(trl, f"{name}Trainer")(model, args=getattr(trl, f"{name}Config")(**options), **arguments).train()
    assert any(not torch.equal(value, before[name]) for name, value in values(model).items())
    files = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


def adalora(**options):
    settings = {"init_r": 4, "target_r": 2, "total_step": 4, "tfinal": 1, "target_modules": "all-linear"}
    torch.manual_seed(1)
    return qk.peft.get_peft_model(
        build("tied"), qk.peft.AdaLoraConfig(task_type="CAUSAL_LM", **{**settings, **options})
    )


def test_adalora_matches_manual_training_loop(tmp_path):
    """Ranks move, and the regularizer is in the gradients that are clipped; a resumed run ends with the same values."""
    from qlora_kernels.integrations.trainer import PeftCallback

    whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    ours, resumed = (trainer(adalora(), tmp_path / name, max_grad_norm=0.1, **whole) for name in ("a", "b"))
    for each in (ours, resumed):
        each.add_callback(PeftCallback())
    ours.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    model = adalora().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    batch = {name: torch.stack([row[name] for row in ROWS]) for name in ("input_ids", "labels")}
    for step in range(4):
        (model(**batch).loss + model.peft_loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        model.step(step)
        optimizer.zero_grad()
    kept = [
        [layer.deltas["default"].kept for layer in m.injector.adapted_layers().values()] for m in (model, ours.model)
    ]
    assert sum(int(mask.sum()) for mask in kept[1]) == 2 * len(kept[1])
    assert all(torch.equal(*pair) for pair in zip(*kept, strict=True))
    expected = values(ours.model)
    for name, value in values(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, expected[name]) for name, value in values(resumed.model).items())


def test_the_best_adalora_is_loaded_in_place(tmp_path):
    """Its checkpoint, the first, has more triplets than the adapter at the end of training."""
    from qlora_kernels.integrations.trainer import PeftCallback

    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 3.0}
    ours = trainer(adalora(lora_alpha=64), tmp_path, callbacks=[PeftCallback()], **options)
    ours.train()
    assert ours.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = qk.peft.PeftModel.from_pretrained(build("tied"), ours.state.best_model_checkpoint)
    # The file's update has the kept triplets alone, and so another order of sums, over factors of size 5.
    assert_same_function(logits(ours.model.eval()), logits(saved))


def test_adalora_without_its_callback_cannot_be_saved(tmp_path):
    ours = trainer(adalora(), tmp_path, max_steps=1, save_steps=1)
    with pytest.raises(RuntimeError, match=r"step\(global_step\) must be called .*PeftCallback calls it"):
        ours.train()


def test_the_callback_refuses_a_model_of_another_kind(tmp_path):
    from qlora_kernels.integrations.trainer import PeftCallback

    with pytest.raises(TypeError, match=r"must be a qlora_kernels\.peft\.PeftModel, got LlamaForCausalLM"):
        trainer(build("llama"), tmp_path, max_steps=1, callbacks=[PeftCallback()]).train()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_label_smoothing_shifts_the_labels_of_causal_models(kind, tmp_path):
    """Loss and gradients are Trainer's for the merged model: the smoothed loss over shifted labels.

    Trainer divides it by the number of labels, which it counts after the shift for models with a known loss only.
    """
    rows = [{**row, "labels": torch.cat([row["labels"][:5], torch.full((3,), -100)])} for row in ROWS]
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.2)
    model = adapted(kind, target_modules=["c_attn" if kind == "gpt2" else "q_proj"], init_lora_weights=False)
    inputs, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    loss = smoother({"logits": model(input_ids=inputs).logits}, labels, shift_labels=True)
    plain = trainer(copy.deepcopy(model).merge_and_unload(), tmp_path, rows=rows, label_smoothing_factor=0.2)
    wanted = plain.evaluate()["eval_loss"]
    assert wanted == pytest.approx(loss.item() * (4 / 5 if kind == "gpt2" else 1), rel=1e-4)
    (loss * wanted / loss.detach()).backward()
    expected = {name: p.detach() - 0.1 * p.grad for name, p in model.named_parameters() if p.requires_grad}
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "optim": "sgd"}
    ours = trainer(
        model,
        tmp_path,
        rows=rows,
        label_smoothing_factor=0.2,
        learning_rate=0.1,
        max_grad_norm=0.0,
        save_strategy="no",
        eval_strategy="no",
        **settings,
    )
    assert ours.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-4)
    ours.train()
    assert ours.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-4)
    for name, value in values(model).items():
        assert_same_function(value, expected[name], name)
    assert ours.compute_loss_func is None


def test_label_smoothing_of_other_models(tmp_path):
    """The labels of an encoder-decoder are not shifted, and models without adapters are not affected."""
    config = transformers.T5Config(
        vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0, pad_token_id=0
    )
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(config)
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.2)
    rows = [{**row, "decoder_input_ids": row["labels"]} for row in ROWS]
    names = ("input_ids", "decoder_input_ids", "labels")
    batch = {name: torch.stack([row[name] for row in rows]) for name in names}
    labels = batch.pop("labels")
    for wrap in (lambda model: model, lambda model: qk.peft.get_peft_model(model, qk.peft.LoraConfig(r=2))):
        model = wrap(copy.deepcopy(base))
        expected = smoother(model(**batch), labels).item()
        ours = trainer(model, tmp_path, rows=rows, label_smoothing_factor=0.2)
        assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("quantized_head", [False, True])
def test_sft_trains_an_adapter_on_the_head(quantized_head, chat_model, tmp_path):
    """TRL multiplies by the head's weight itself: the first loss and the trained values are the model's own."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = build("llama")
    if quantized_head:
        qk.replace_linear(model, skip=())
    config = qk.peft.LoraConfig(
        r=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = qk.peft.get_peft_model(model, config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    ids = torch.arange(1, 13).tolist()
    rows = datasets.Dataset.from_list([{"input_ids": ids, "labels": ids}] * 2)
    inputs = torch.tensor([ids] * 2)
    loss = model(input_ids=inputs, labels=inputs).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    before = values(model)
    model.zero_grad()
    settings = {**TRL_SETTINGS, "max_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 0.0}
    arguments = trl.SFTConfig(output_dir=str(tmp_path), save_strategy="no", optim="sgd", **settings)
    ours = trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    ours.train()
    assert ours.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, value in values(model).items():
        torch.testing.assert_close(before[name] - value, 1e-3 * grads[name], rtol=1e-2, atol=1e-7)
    assert sum("lm_head" in name for name in grads) == 2
