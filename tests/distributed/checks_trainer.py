"""transformers' Trainer with accelerate's FSDP2: evaluation, checkpoints, the best model, and resumption.

accelerate enables FSDP only on accelerators; here its state is told that it is enabled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments

import qlora_kernels as qk
from qlora_kernels.peft import LoraConfig, PeftModel, get_peft_model
from tests.distributed.processes import Group
from tests.peft.models import batch as tokens
from tests.peft.models import llama

ROWS = tokens("llama", rows=4)["input_ids"]
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@contextmanager
def _accelerate(group: Group, **settings: str) -> Iterator[None]:
    """Set the variables of `accelerate launch`, and enable FSDP on the CPU."""
    original = accelerate_state.AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **options):
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    launcher = {"RANK": str(group.rank), "LOCAL_RANK": str(group.rank), "WORLD_SIZE": str(group.world)}
    launcher |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # of no use: the group exists
    accelerate_state.AcceleratorState._reset_state(True)
    with (
        mock.patch.object(accelerate_state.AcceleratorState, "__init__", init),
        mock.patch.dict(os.environ, {**launcher, **FSDP2, **settings}),
    ):
        yield
    accelerate_state.AcceleratorState._reset_state(True)


def _model() -> PeftModel:
    torch.manual_seed(0)
    model = llama()
    qk.replace_linear(model)
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["norm"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _trainer(model: nn.Module, folder, **options):
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    arguments = TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "load_best_model_at_end": True,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def _losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _run(group: Group, kind: str) -> None:
    """Losses equal those of one process, the best step is restored, and a run resumes from a checkpoint.

    transformers 5.24 looks for the best checkpoint's folder before it writes a sharded one, so that processes may
    choose different steps; the best step is therefore restored from full ones only.
    """
    folder = group.folder / kind
    options = {"per_device_train_batch_size": 2, "load_best_model_at_end": kind == "FULL_STATE_DICT"}
    shared = [None]
    if group.rank == 0:
        one = _trainer(_model(), group.folder / f"one process {kind}")
        one.train()
        shared = [(_losses(one), one.evaluate()["eval_loss"])]
    dist.broadcast_object_list(shared, src=0)
    losses, evaluated = shared[0]
    with _accelerate(group, FSDP_STATE_DICT_TYPE=kind):
        trainer = _trainer(qk.make_shardable(_model()), folder, **options)
        trainer.train()
        assert _losses(trainer) == pytest.approx(losses, rel=1e-3)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated, rel=1e-3)
        again = _trainer(qk.make_shardable(_model()), folder, **options)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert _losses(again) == pytest.approx(losses, rel=1e-3)
        assert again.evaluate()["eval_loss"] == pytest.approx(evaluated, rel=1e-3)
        again.model.save_pretrained(folder / "adapter")
    for adapter in (folder / "adapter", folder / "checkpoint-4"):
        if group.rank == 0 and (adapter.name == "adapter" or kind == "FULL_STATE_DICT"):
            alone = PeftModel.from_pretrained(_model().unload(), adapter)
            with torch.no_grad():
                loss = alone(input_ids=ROWS, labels=ROWS).loss
            assert float(loss) == pytest.approx(evaluated, rel=1e-3)
    dist.barrier()


def full_state_dicts(group: Group) -> None:
    """Checkpoints hold the adapter as save_pretrained writes it."""
    _run(group, "FULL_STATE_DICT")


def sharded_state_dicts(group: Group) -> None:
    """Checkpoints hold the shards of the adapter's parameters, for which accelerate calls PEFT's functions."""
    _run(group, "SHARDED_STATE_DICT")


CHECKS = {f.__name__: f for f in (full_state_dicts, sharded_state_dicts)}
