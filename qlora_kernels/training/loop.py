"""The training loop: AdamW steps over a fixed order of batches, with checkpoints from which a run resumes exactly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ..io.training_state import Stateful, load_latest, save_training_state
from .batches import Batch, BatchOrder, collate
from .chunked_loss import ChunkedLoss
from .schedule import Schedule, factor
from .windows import Example


@dataclass(frozen=True)
class TrainConfig:
    """steps: optimizer steps of `batch_size` examples, of which `micro_batch` at a time are in memory (0: all).

    lr: peak learning rate, reached after warmup_steps.   max_grad_norm: gradients are clipped to it; 0 for never.
    checkpoint_every: steps between checkpoints; 0 for none.   seed: of the order of the examples.
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
    """step counts from 1.   loss: nats per learned token.   grad_norm: before clipping.   seconds: of this step."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


@runtime_checkable
class Adapted(Protocol):
    """What a PEFT method may add to a step; qk.peft.PeftModel has both."""

    def peft_loss(self) -> Tensor: ...

    def step(self, global_step: int) -> None: ...


class ResumeError(ValueError):
    """The checkpoint belongs to a run with other settings."""


def train(
    loss: ChunkedLoss,
    examples: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    pad_token_id: int = 0,
    checkpoints: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    on_step: Callable[[StepRecord], object] = lambda record: None,
) -> list[StepRecord]:
    """Train the parameters of loss.model that require a gradient, and return every step's record.

    checkpoints: folder for config.checkpoint_every and `resume`.
    settings: what, beside `config`, must not change for a resumed run to be the same run; kept in the checkpoint.
    resume: continue from the newest checkpoint, if any.
    A resumed run computes the same bits as one that was never interrupted.
    Raises ResumeError where the checkpoint's settings differ; FloatingPointError for a loss that is not finite.
    """
    model = loss.model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    identity = json.dumps({**asdict(config), "checkpoint_every": None, **(settings or {})}, sort_keys=True)
    records: list[StepRecord] = []
    if resume and checkpoints is not None:
        records = _resume(checkpoints, identity, trained, optimizer)
        for record in records:
            on_step(record)
    order = BatchOrder(len(examples), config.batch_size, config.seed)
    model.train()
    for step in range(len(records), config.steps):
        chosen = [examples[i] for i in order.indices(step)]
        records.append(_step(loss, chosen, optimizer, list(trained.values()), config, step, pad_token_id))
        on_step(records[-1])
        if checkpoints is not None and config.checkpoint_every and (step + 1) % config.checkpoint_every == 0:
            _save(checkpoints, identity, trained, optimizer, records)
    return records


def _step(
    loss: ChunkedLoss,
    chosen: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    trained: list[nn.Parameter],
    config: TrainConfig,
    step: int,
    pad_token_id: int,
) -> StepRecord:
    started = time.perf_counter()
    lr = config.lr * factor(config.schedule, step, config.steps, config.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    size = config.micro_batch or len(chosen)
    micro_batches = [collate(chosen[i : i + size], pad_token_id) for i in range(0, len(chosen), size)]
    mean = _backward(loss, micro_batches)
    if not math.isfinite(mean):
        raise FloatingPointError(f"train: the loss of step {step + 1} must be finite, got {mean}; use a smaller lr")
    norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
    optimizer.step()
    if isinstance(loss.model, Adapted):
        loss.model.step(step + 1)
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(batch.input_ids.numel() for batch in micro_batches)
    return StepRecord(step + 1, mean, lr, norm.item(), tokens, time.perf_counter() - started)


def _backward(loss: ChunkedLoss, micro_batches: Sequence[Batch]) -> float:
    """Accumulate the gradient of the mean over all learned tokens; returns that mean, auxiliary losses left out."""
    learned = sum(batch.learned_tokens for batch in micro_batches)
    mean = 0.0
    for batch in micro_batches:
        share = loss(batch) / learned
        mean += share.item()
        if isinstance(loss.model, Adapted):
            share = share + loss.model.peft_loss() / len(micro_batches)
        share.backward()  # type: ignore[no-untyped-call]
    return mean


def _save(
    checkpoints: Path,
    identity: str,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    records: Sequence[StepRecord],
) -> None:
    parts = {
        "settings": identity,
        "trained": {name: parameter.detach() for name, parameter in trained.items()},
        "optimizer": optimizer,
        "records": [asdict(record) for record in records],
    }
    save_training_state(checkpoints, len(records), parts)


def _resume(
    checkpoints: Path, identity: str, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[StepRecord]:
    state = load_latest(checkpoints)
    if state is None:
        return []
    saved, wanted = json.loads(state.parts["settings"]), json.loads(identity)
    changed = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if changed:
        raise ResumeError(
            f"{checkpoints}: a resumed run must keep its settings, got another "
            + ", ".join(f"{key} ({saved.get(key)} -> {wanted.get(key)})" for key in changed)
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state.parts["trained"][name])
    state.restore({"optimizer": cast(Stateful, optimizer)})
    return [StepRecord(**record) for record in state.parts["records"]]
