"""Our PeftModel in transformers' Trainer, unchanged: checkpoints, resuming, the best model."""

from __future__ import annotations

import copy

import pytest
import torch

import qlora_kernels as qk
from tests.support.tolerances import assert_same_function

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from .tiny_models import assert_same_model, build, logits  # noqa: E402
from .trainer_runs import adapted, trainer, values  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(trainer after four steps over a model with a tied head, its folder)."""
    folder = tmp_path_factory.mktemp("run")
    ours = trainer(adapted(), folder)
    ours.train()
    return ours, folder


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
    """The first evaluation is the best."""
    ours = trainer(
        adapted(lora_alpha=64),
        tmp_path,
        scores=(2.0, 1.0, 0.0, 0.0),
        max_steps=8,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        save_total_limit=1,
    )
    ours.add_callback(transformers.EarlyStoppingCallback(early_stopping_patience=1))
    ours.train()
    assert ours.state.global_step == 4
    assert ours.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = qk.peft.PeftModel.from_pretrained(adapted().unload(), ours.state.best_model_checkpoint)
    assert_same_model(saved, ours.model.eval())
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
