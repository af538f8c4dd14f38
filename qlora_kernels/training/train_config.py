"""The settings of a training run, and the record of one of its steps."""

from __future__ import annotations

from dataclasses import dataclass

from .schedule import Schedule


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
    """The measurements of one optimizer step.

    step: counted from 1.   loss: nats per learned token.   lr: learning rate.   grad_norm: norm before clipping.
    tokens: learned tokens of the step.   seconds: duration of the step.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
