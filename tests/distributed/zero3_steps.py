"""Five steps under DeepSpeed's ZeRO-3, in each process of a torchrun: python -m tests.distributed.zero3_steps FILE

Rank 0 writes the losses, those of one process, the bytes of the NF4 weights that it holds and that there are, and the
losses of the last steps after each way to restore the model of the third one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn

import qlora_kernels as qk
from qlora_kernels.nn.quantized_weight import QuantizedWeight
from qlora_kernels.peft import PeftModel
from tests.distributed.models import batch, build, loss_of, trained

STEPS, SAVED, ROWS = 5, 3, 12


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def _losses_of_one_process() -> list[float]:
    model, losses = build(), []
    optimizer = _optimizer(model)
    for step in range(STEPS):
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _bytes_held(weight: QuantizedWeight) -> int:
    """Return the bytes of this process: a parameter's shard is `ds_tensor`."""
    parameters = sum(getattr(p, "ds_tensor", p).nbytes for p in weight.parameters(recurse=False))
    return parameters + sum(buffer.nbytes for buffer in weight.buffers(recurse=False))


def _engine(model: Any, world: int) -> Any:
    qk.make_shardable(model)
    config = {
        "train_micro_batch_size_per_gpu": ROWS // world,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=_optimizer(model), config=config)[0]


def _losses(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(engine, batch(step).chunk(dist.get_world_size())[dist.get_rank()])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def _restored(folder: Path, world: int) -> dict[str, list[float]]:
    """Return the losses of the last steps of new engines that load the checkpoints."""
    last = range(SAVED, STEPS)
    whole = _engine(build(seed=7), world)  # with another base and adapter
    whole.load_checkpoint(folder / "whole")
    other = build()
    for parameter in trained(other).values():
        parameter.data += 1.0
    adapter = _engine(other, world)
    adapter.load_checkpoint(folder / "adapter", load_module_strict=False)
    return {"load_checkpoint": _losses(whole, last), "without frozen parameters": _losses(adapter, last)}


def _restored_alone(folder: Path) -> dict[str, list[float]]:
    """Return the loss of the next step of models of one process that read files of several."""
    states = get_fp32_state_dict_from_zero_checkpoint(folder / "whole")
    model = qk.make_shardable(build(seed=7))
    model.load_state_dict(states)
    sixteen = qk.make_shardable(build(seed=7))
    sixteen.load_state_dict(torch.load(folder / "sixteen" / "pytorch_model.bin", weights_only=True))
    results = {"zero_to_fp32": model, "save_16bit_model": sixteen}
    for name in ("gathered", "consolidated"):
        results[f"save_pretrained, {name}"] = PeftModel.from_pretrained(build().unload(), folder / name)
    return {name: [loss_of(model, batch(SAVED)).item()] for name, model in results.items()}


def main(file: Path) -> None:
    """Run both and write the results."""
    deepspeed.init_distributed("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model, folder = build(), file.parent
    weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    whole = sum(_bytes_held(weight) for weight in weights)
    engine = _engine(model, world)
    losses = _losses(engine, range(SAVED))
    held = sum(_bytes_held(weight) for weight in weights)
    engine.save_checkpoint(folder / "whole")
    engine.save_checkpoint(folder / "adapter", exclude_frozen_parameters=True)
    engine.save_16bit_model(folder / "sixteen")
    model.save_pretrained(folder / "gathered")
    consolidated = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if rank == 0:
        model.save_pretrained(folder / "consolidated", state_dict=consolidated)  # as transformers' Trainer does
    losses += _losses(engine, range(SAVED, STEPS))
    restored = _restored(folder, world)
    if rank == 0:
        restored |= _restored_alone(folder)
        results = {"losses": losses, "one_process": _losses_of_one_process(), "held": held, "whole": whole}
        file.write_text(json.dumps({**results, "restored": restored}), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
