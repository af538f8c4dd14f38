"""Evaluation during training: when it is due, which step is the best, and when training stops early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Evaluated:
    """The result of one evaluation during training.

    step: counted from 1; the parameters after this step were measured.   value: the lower, the better.
    """

    step: int
    value: float


@dataclass
class Validation:
    """Measures the model every `every` steps and after the last one, and keeps the parameters of the best step.

    measure: returns the value to minimize, such as a perplexity on unseen text; the model is in training mode before
    and after. It must draw no random numbers.
    patience: training stops after this many evaluations in a row without a new lowest value; 0 for never.
    records: all evaluations so far.   best_parts: a copy of what `train` needs to restore the best step.
    """

    measure: Callable[[], float]
    every: int
    patience: int = 0
    on_evaluated: Callable[[Evaluated], object] = lambda record: None
    records: list[Evaluated] = field(default_factory=list)
    best_parts: Any = None

    def __post_init__(self) -> None:
        """Raise ValueError for counts that are out of range."""
        if self.every < 1:
            raise ValueError(f"Validation: every must be >= 1, got {self.every}")
        if self.patience < 0:
            raise ValueError(f"Validation: patience must be >= 0, got {self.patience}; 0 never stops early")

    @property
    def best(self) -> Evaluated | None:
        """The first of the evaluations with the lowest value."""
        return min(self.records, key=lambda record: record.value, default=None)

    @property
    def stops(self) -> bool:
        """Whether the last `patience` evaluations gave no new lowest value."""
        if not self.patience or self.best is None:
            return False
        return len(self.records) - 1 - self.records.index(self.best) >= self.patience

    def is_due(self, step: int, last: int) -> bool:
        """Whether the parameters after this step, which counts from 1, are measured."""
        return step % self.every == 0 or step == last

    def evaluate(self, step: int, parts: Callable[[], Any]) -> None:
        """Measure the parameters after `step`.   parts: returns a copy of them, taken where the value is the lowest."""
        self.records.append(Evaluated(step, self.measure()))
        if self.best is self.records[-1]:
            self.best_parts = parts()
        self.on_evaluated(self.records[-1])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the validation."""
        return {"records": [(record.step, record.value) for record in self.records], "best_parts": self.best_parts}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's `state`."""
        self.records = [Evaluated(step, value) for step, value in state["records"]]
        self.best_parts = state["best_parts"]
        for record in self.records:
            self.on_evaluated(record)

    def reason(self) -> str:
        """Return why the best step is kept and why training ended."""
        best = self.best
        if best is None:
            return "no evaluation was made"
        text = f"step {best.step} has the lowest value ({best.value:.4f}) of {len(self.records)} evaluations"
        if self.stops:
            text += f"; training stopped at step {self.records[-1].step}, after {self.patience} without a lower one"
        return text
