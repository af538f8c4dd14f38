"""The training loop: AdamW steps over a fixed order of batches, with checkpoints from which a run resumes exactly."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..io.training_state import Stateful, TrainingState, load_latest, save_training_state
from ..peft import PeftModel
from ..peft.framework.method import Method
from .batches import Batch, BatchOrder, collate
from .chunked_loss import ChunkedLoss
from .schedule import Schedule, factor
from .sharded_model import (
    ShardedState,
    clip_gradients,
    copy_into,
    gathered,
    idle_batch,
    is_sharded,
    reshard,
    sum_gradients,
)
from .validation import Validation
from .windows import Example
from .workers import ONE_PROCESS, Workers


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    steps: optimizer steps of `batch_size` examples; `micro_batch` of them are in memory at a time (0: all).

    lr: peak learning rate, reached after warmup_steps.   max_grad_norm: gradients are clipped to it; 0 disables
    clipping.
    checkpoint_every: steps between checkpoints; the last step is always one; 0 disables checkpoints.
    seed: of the order of the examples.
    """

    steps: int
    batch_size: int
    lr: float
    warmup_steps: int = 0
    schedule: Schedule = "cosine"
    max_grad_norm: float = 1.0
    micro_batch: int = 0
    checkpoint_every: int = 0
    seed: int = 0


@dataclass(frozen=True)
class StepRecord:
    """step: counted from 1.   loss: nats per learned token.   grad_norm: before clipping.   seconds: of this step."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


class ResumeError(ValueError):
    """The checkpoint belongs to a run with other settings."""


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
    sharded = is_sharded(model)
    reshard(model)
    sum_gradients(model)
    identity = json.dumps(
        {
            **asdict(config),
            "checkpoint_every": None,
            "examples": fingerprint(examples),
            # Runs without evaluations keep the settings that checkpoints of earlier versions hold.
            **({"eval_every": validation.every, "patience": validation.patience} if validation else {}),
            **(settings or {}),
        },
        sort_keys=True,
    )
    if checkpoints is not None and not resume:
        _check_unused(checkpoints, workers)
    state = load_latest(checkpoints) if resume and checkpoints is not None else None
    records: list[StepRecord] = []
    if state is not None:
        _check_identity(str(checkpoints), state, identity)
        _restore_model(model, state.parts)
        records = [StepRecord(**record) for record in state.parts["records"]]
    # Only after the model was restored, because this may replace parameters.
    trained = list(_trained(model).values())
    if not sharded:
        workers.start_alike(trained)
    stepper = optimizer(trained)
    saved: Stateful = ShardedState(stepper) if sharded else cast(Stateful, stepper)
    if state is not None:
        state.restore({"optimizer": saved})
    for record in records:
        on_step(record)
    if state is not None and validation is not None:
        validation.restore(state.parts["validation"])
    order = BatchOrder(len(examples), config.batch_size, config.seed)
    model.train()

    def save() -> Path | None:
        if checkpoints is None or not (workers.first or sharded):
            return None
        parts = {"settings": identity, "optimizer": saved, "records": [asdict(record) for record in records]}
        if validation is not None:
            parts["validation"] = validation.state()
        parts |= _model_parts(model)
        if sharded:
            parts = gathered({**parts, "optimizer": saved.state_dict()}, keep=workers.first)
        return save_training_state(checkpoints, len(records), parts) if workers.first else None

    for step in range(len(records), config.steps):
        if validation is not None and validation.stops:
            break
        chosen = [examples[i] for i in order.indices(step)]
        workers.seed(config.seed, step)
        with workers.naming_the_lost():
            records.append(_step(loss, chosen, stepper, trained, config, step, pad_token_id, workers))
        on_step(records[-1])
        if validation is not None and validation.is_due(step + 1, config.steps):
            validation.evaluate(step + 1, lambda: _copied(_model_parts(model)))
        last = step + 1 == config.steps or (validation is not None and validation.stops)
        # Processes that share a batch must agree, because each of them may have got the signal at another step.
        if not last and interrupted is not None and workers.total(float(interrupted())):
            checkpoint = save()
            workers.wait()  # a launcher ends the other processes as soon as one has left
            raise Interrupted(step + 1, config.steps, checkpoint)
        every = config.checkpoint_every
        if (every and (step + 1) % every == 0) or (last and (every or interrupted is not None)):
            save()
    if validation is not None and validation.best_parts is not None:
        _restore_model(model, validation.best_parts)
    return records


def _check_unused(checkpoints: Path, workers: Workers) -> None:
    found = next(iter(sorted(checkpoints.glob("step-*.safetensors"))), None)
    workers.wait()  # before one of them writes the first checkpoint
    if found is not None:
        raise ResumeError(
            f"train: checkpoints must hold no other run's checkpoints, got {found}; resume that run, use another "
            "folder, or remove them"
        )


def _copied(value: Any) -> Any:
    """Return a copy of nested dicts and lists with tensors, which the next step would change in place."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def fingerprint(examples: Sequence[Example]) -> str:
    """Return 16 hex digits that depend on all tokens and labels of the examples and on their order."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.input_ids, example.labels):
            digest.update(len(ids).to_bytes(8, "little") + ids.contiguous().numpy().tobytes())
        if example.lengths is not None:
            digest.update(str(example.lengths).encode())
    return digest.hexdigest()[:16]


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
    most = -(-len(chosen) // workers.world)  # examples of the process that has the most
    size = config.micro_batch or max(most if sharded else len(own), 1)
    micro_batches = [collate(own[i : i + size], pad_token_id) for i in range(0, len(own), size)]
    tokens = sum(batch.input_ids.numel() for batch in micro_batches)
    if sharded:
        idle = idle_batch(collate(chosen[:1], pad_token_id))
        micro_batches += [idle] * (-(-most // size) - len(micro_batches))
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
        share.backward()  # type: ignore[no-untyped-call]
    return workers.total(mean)


def _check_identity(place: str, state: TrainingState, identity: str) -> None:
    saved, wanted = json.loads(state.parts["settings"]), json.loads(identity)
    for key in {"examples", "base"} & wanted.keys():  # absent in checkpoints of older versions
        saved.setdefault(key, wanted[key])
    changed = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if changed:
        differences = ", ".join(f"{key} ({saved.get(key)} -> {wanted.get(key)})" for key in changed)
        raise ResumeError(f"{place}: a resumed run must keep its settings, got another {differences}")


def _model_parts(model: nn.Module) -> dict[str, Any]:
    """Return the trained parameters and the state of PEFT methods, such as AdaLoRA's importances."""
    return {
        "trained": {name: parameter.detach() for name, parameter in _trained(model).items()},
        "methods": [method.training_state() for method in _methods(model)],
    }


def _restore_model(model: nn.Module, parts: Mapping[str, Any]) -> None:
    """Restore the result of `_model_parts`."""
    for method, (values, tensors) in zip(_methods(model), parts["methods"], strict=True):
        method.load_training_state(values, tensors)
    trained, saved = _trained(model), parts["trained"]
    if trained.keys() != saved.keys():
        other = sorted(trained.keys() ^ saved.keys())
        raise ResumeError(f"train: the checkpoint must hold the parameters that are trained, {other[0]} differs")
    with torch.no_grad():
        for name, parameter in trained.items():
            copy_into(parameter, saved[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _methods(model: nn.Module) -> list[Method]:
    if not isinstance(model, PeftModel):
        return []
    return [method for name in model.active_adapters for method in model.injector.adapters[name]]
