"""Three steps under DeepSpeed's ZeRO-3, in each process of a torchrun: python -m tests.distributed.zero3_steps FILE

Rank 0 writes the losses, those of one process, and the bytes of the NF4 weights that it holds and that there are.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import qlora_kernels as qk
from qlora_kernels.nn.quantized_weight import QuantizedWeight
from tests.distributed.models import batch, build, loss_of

STEPS, ROWS = 3, 12


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


def main(file: Path) -> None:
    """Run both and write the results."""
    deepspeed.init_distributed("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build()
    weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    whole = sum(_bytes_held(weight) for weight in weights)
    qk.make_shardable(model)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": ROWS // world,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(model), config=config)
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine, batch(step).chunk(world)[rank])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    if rank == 0:
        held = sum(_bytes_held(weight) for weight in weights)
        results = {"losses": losses, "one_process": _losses_of_one_process(), "held": held, "whole": whole}
        file.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
