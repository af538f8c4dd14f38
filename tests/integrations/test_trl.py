"""Our PeftModel in the trainers of TRL, unchanged."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from tests.support.tiny_model import write_tiny_llama

transformers = pytest.importorskip("transformers")
trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
pytest.importorskip("peft")

from .tiny_models import build  # noqa: E402
from .trainer_runs import values  # noqa: E402

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


def test_sft_trainer(chat_model, tmp_path):
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


@pytest.mark.parametrize("quantized_head", [False, True])
def test_sft_trains_an_adapter_on_the_head(quantized_head, chat_model, tmp_path):
    """TRL multiplies by the head's weight itself: the first loss and the trained values are the model's own."""
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


@pytest.mark.parametrize("initial", ["new", "trained", "head"])
def test_dpo_trainer_starts_at_its_reference(initial, chat_model, tmp_path):
    """The reference is the adapter as it was given, or the base model: the first loss is ln 2, the margin 0.

    TRL multiplies by the head's weight itself, also where the head has an adapter ("head").
    """
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
        # The two completions of a prompt follow one another; equal rewards would give no gradient.
        arguments["reward_funcs"] = lambda completions, **_: [float(i % 2) for i in range(len(completions))]
    before = values(model)
    getattr(trl, f"{name}Trainer")(model, args=getattr(trl, f"{name}Config")(**options), **arguments).train()
    assert any(not torch.equal(value, before[name]) for name, value in values(model).items())
    files = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
