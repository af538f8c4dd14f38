"""PeftCallback: AdaLoRA's schedule and regularizer in transformers' Trainer."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from tests.support.tolerances import assert_same_function

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from qlora_kernels.integrations.trainer import PeftCallback

from .tiny_models import build, logits
from .trainer_runs import ROWS, trainer, values


def adalora(**options):
    settings = {"init_r": 4, "target_r": 2, "total_step": 4, "tfinal": 1, "target_modules": "all-linear"}
    torch.manual_seed(1)
    return qk.peft.get_peft_model(
        build("tied"), qk.peft.AdaLoraConfig(task_type="CAUSAL_LM", **{**settings, **options})
    )


def test_adalora_matches_manual_training_loop(tmp_path):
    """Ranks move, and the regularizer is in the gradients that are clipped; a resumed run ends with the same values."""
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
    options = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    ours = trainer(adalora(lora_alpha=64), tmp_path, scores=(2.0, 1.0), callbacks=[PeftCallback()], **options)
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
    with pytest.raises(TypeError, match=r"must be a qlora_kernels\.peft\.PeftModel, got LlamaForCausalLM"):
        trainer(build("llama"), tmp_path, max_steps=1, callbacks=[PeftCallback()]).train()
