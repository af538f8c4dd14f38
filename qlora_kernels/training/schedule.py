"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def factor(schedule: Schedule, step: int, steps: int, warmup_steps: int) -> float:
    """Return the factor of the peak rate in step 0, 1, ...: linear warm-up to 1, then decay to 0 after the last step.

    The factor is positive in all steps: 1 / warmup_steps in the first one.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
