"""The training loop: AdamW steps over a fixed order of batches, with checkpoints from which a run resumes exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..peft import PeftModel
from ..rounding import cdiv
from .batches import Batch, BatchOrder, collate
from .chunked_loss import ChunkedLoss
from .run_state import RunState, run_identity, trained_parameters
from .schedule import factor
from .sharded_model import clip_gradients, idle_batch, is_sharded, reshard, sum_gradients
from .train_config import StepRecord, TrainConfig
from .validation import Validation
from .windows import Example
from .workers import ONE_PROCESS, Workers


class Interrupted(Exception):
    """Training was stopped after a complete step.

    step: the last finished one.   steps: of the whole run.   checkpoint: the file that the run continues from, or None
    where `train` was given no folder.
    """

    def __init__(self, step: int, steps: int, checkpoint: Path | None) -> None:
        super().__init__(f"train: stopped after step {step} of {steps}")
        self.step, self.steps, self.checkpoint = step, steps, checkpoint


def train(
    loss: ChunkedLoss,
    examples: Sequence[Example],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    config: TrainConfig,
    *,
    pad_token_id: int = 0,
    checkpoints: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    on_step: Callable[[StepRecord], object] = lambda record: None,
    validation: Validation | None = None,
    interrupted: Callable[[], bool] | None = None,
    workers: Workers | None = None,
) -> list[StepRecord]:
    """Train the parameters of loss.model that require a gradient, and return every step's record.

    optimizer: makes it from those parameters.   checkpoints: folder for config.checkpoint_every and `resume`.
    settings: values, in addition to `config`, that must not change between runs of one training; kept in the
    checkpoint.
    resume: continue from the newest checkpoint, if any, also with another number of processes.
    validation: evaluations during training. At the end the model holds the parameters of the best step, and the last
    checkpoint holds both those and the parameters of the last step. A run that is resumed must be given one with the
    same `every` and `patience`.
    interrupted: called after every step. If it returns True, a checkpoint is written (to `checkpoints`) and Interrupted
    is raised. With it, the last step is always a checkpoint.
    workers: the processes that share every batch, and of which rank 0 writes the checkpoints. Each has the whole model,
    or its shards of it after `fully_shard`; for that, the model must be equal in all processes before. Checkpoints are
    the same: the trained parameters and the optimizer's states are gathered, one tensor at a time.
    A resumed run computes the same bits as an uninterrupted one.
    Raises ResumeError where the checkpoint's settings differ, and, without `resume`, where `checkpoints` holds a run's
    checkpoints already: they are never mixed with another run's and never removed.
    Raises FloatingPointError for a loss that is not finite.
    """
    model, workers = loss.model, workers or ONE_PROCESS
    reshard(model)
    sum_gradients(model)
    run = RunState(model, run_identity(config, examples, validation, settings), checkpoints, validation, workers)
    found = run.load_model(resume=resume)
    # Only after the model was loaded, because this may replace parameters.
    trained = list(trained_parameters(model).values())
    if not run.sharded:
        workers.start_alike(trained)
    stepper = optimizer(trained)
    run.load_optimizer(stepper, found)
    for record in run.records:
        on_step(record)
    run.load_validation(found)
    order = BatchOrder(len(examples), config.batch_size, config.seed)
    model.train()
    for step in range(len(run.records), config.steps):
        if run.stops_early:
            break
        chosen = [examples[i] for i in order.indices(step)]
        workers.seed(config.seed, step)
        with workers.naming_the_lost():
            run.records.append(_step(loss, chosen, stepper, trained, config, step, pad_token_id, workers))
        on_step(run.records[-1])
        run.validate(step + 1, config.steps)
        last = step + 1 == config.steps or run.stops_early
        # Processes that share a batch must agree, because each of them may have got the signal at another step.
        if not last and interrupted is not None and workers.total(float(interrupted())):
            checkpoint = run.save()
            workers.wait()  # a launcher ends the other processes as soon as one has left
            raise Interrupted(step + 1, config.steps, checkpoint)
        every = config.checkpoint_every
        if (every and (step + 1) % every == 0) or (last and (every or interrupted is not None)):
            run.save()
    run.restore_best()
    return run.records


def _step(
    loss: ChunkedLoss,
    chosen: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    config: TrainConfig,
    step: int,
    pad_token_id: int,
    workers: Workers,
) -> StepRecord:
    started = time.perf_counter()
    lr = config.lr * factor(config.schedule, step, config.steps, config.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    own = workers.share(chosen)
    sharded = is_sharded(loss.model)
    most = cdiv(len(chosen), workers.world)  # examples of the process that has the most
    size = config.micro_batch or max(most if sharded else len(own), 1)
    micro_batches = [collate(own[i : i + size], pad_token_id) for i in range(0, len(own), size)]
    tokens = sum(batch.input_ids.numel() for batch in micro_batches)
    if sharded:
        idle = idle_batch(collate(chosen[:1], pad_token_id))
        micro_batches += [idle] * (cdiv(most, size) - len(micro_batches))
    scale = _gradient_scale(loss.model, trained, micro_batches, workers)
    mean = _backward(loss, micro_batches, workers, scale)
    if not sharded:
        workers.sum_gradients(trained)
    if scale != 1.0:
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad /= scale
    if not math.isfinite(mean):
        raise FloatingPointError(f"train: the loss of step {step + 1} must be finite, got {mean}; use a smaller lr")
    norm = clip_gradients(trained, config.max_grad_norm or math.inf)
    optimizer.step()
    if isinstance(loss.model, PeftModel):
        loss.model.step(step)
    optimizer.zero_grad(set_to_none=True)
    tokens = int(workers.total(tokens))
    return StepRecord(step + 1, mean, lr, norm, tokens, time.perf_counter() - started)


def _gradient_scale(
    model: nn.Module, trained: Sequence[nn.Parameter], micro_batches: Sequence[Batch], workers: Workers
) -> float:
    """Return the factor by which the gradients are larger until they are summed: 1.0 but for fp16 models.

    The gradient of the mean loss is that of the sum divided by the number of tokens, and would underflow in fp16. The
    fp32 gradients of the trained parameters are divided instead. Parameters that are trained in fp16 have no such room.
    """
    if all(p.dtype != torch.float16 for p in model.parameters()) or any(p.dtype == torch.float16 for p in trained):
        return 1.0
    return max(workers.total(sum(batch.learned_tokens for batch in micro_batches)), 1.0)


def _backward(
    loss: ChunkedLoss, micro_batches: Sequence[Batch], workers: Workers = ONE_PROCESS, scale: float = 1.0
) -> float:
    """Accumulate this process's part of the gradient of the mean loss over the learned tokens of all processes.

    scale: the gradient's factor (`_gradient_scale`).
    Returns that mean, without auxiliary losses.
    """
    learned = workers.total(sum(batch.learned_tokens for batch in micro_batches))
    taking_part = workers.total(1.0 if micro_batches else 0.0)
    mean = 0.0
    for batch in micro_batches:
        share = loss(batch) / learned
        mean += share.item()
        if isinstance(loss.model, PeftModel):
            share = share + loss.model.peft_loss() / (len(micro_batches) * taking_part)
        if scale != 1.0:
            share = share * scale
        share.backward()
    return workers.total(mean)
