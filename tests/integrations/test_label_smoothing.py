"""label_smoothing_factor of transformers' Trainer over adapted models."""

from __future__ import annotations

import copy

import pytest
import torch

import qlora_kernels as qk
from tests.support.tolerances import assert_same_function

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from .trainer_runs import ROWS, adapted, trainer, values  # noqa: E402


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
