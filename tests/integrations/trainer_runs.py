"""Tiny adapted models and Trainers over them, shared by the tests of transformers' Trainer and of TRL."""

from __future__ import annotations

import torch
import transformers

import qlora_kernels as qk

from .tiny_models import build

ROWS = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i, "id": i} for i in range(8)]
"""Rows with a column, id, that the model's forward does not take."""


def adapted(kind="tied", **options):
    model = build(kind)
    qk.replace_linear(model)
    torch.manual_seed(1)
    options.setdefault("target_modules", "all-linear")
    return qk.peft.get_peft_model(model, qk.peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))


def trainer(model, folder, *, scores=None, **options):
    """Return a Trainer. scores: what its evaluations report as "score", in turn; more is better.

    Losses of a run depend on the order in which a CPU adds, so that no test expects one to be the smallest.
    """
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
    reported = iter(scores or ())
    metrics = None if scores is None else lambda _: {"score": next(reported)}
    return transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks, compute_metrics=metrics
    )


def values(model):
    """Return a copy of each trained parameter, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
