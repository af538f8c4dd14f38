"""The state of a training run: what its checkpoints hold, and the checks before a run continues from one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..io.training_state import Stateful, TrainingState, load_latest, save_training_state
from ..peft import PeftModel
from ..peft.framework.method import Method
from .sharded_model import ShardedState, copy_into, gathered, is_sharded
from .train_config import StepRecord, TrainConfig
from .validation import Validation
from .windows import Example
from .workers import Workers


class ResumeError(ValueError):
    """The checkpoint belongs to a run with other settings."""


@dataclass
class RunState:
    """The state of one run: the model's trained parameters, the optimizer, the steps' records, the evaluations.

    identity: the settings that must not change between runs of one training (`run_identity`).
    folder: where the checkpoints are; None for a run without.
    """

    model: nn.Module
    identity: str
    folder: Path | None
    validation: Validation | None
    workers: Workers
    records: list[StepRecord] = field(default_factory=list)
    optimizer: Stateful | None = None

    @property
    def sharded(self) -> bool:
        """Whether each process holds its shards of the model, not all of it."""
        return is_sharded(self.model)

    @property
    def stops_early(self) -> bool:
        """Whether the evaluations so far end the run before its last step."""
        return self.validation is not None and self.validation.stops

    def load_model(self, *, resume: bool) -> TrainingState | None:
        """Load the parameters and the records of the newest checkpoint, and return it; None for a new run.

        Raises ResumeError where the checkpoint's settings differ, and, without `resume`, where the folder holds
        checkpoints.
        """
        if self.folder is None:
            return None
        if not resume:
            _check_unused(self.folder, self.workers)
            return None
        state = load_latest(self.folder)
        if state is not None:
            _check_identity(str(self.folder), state, self.identity)
            _restore_model(self.model, state.parts)
            self.records = [StepRecord(**record) for record in state.parts["records"]]
        return state

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: TrainingState | None) -> None:
        """Save this optimizer's state in checkpoints, and load the state that a checkpoint holds."""
        self.optimizer = ShardedState(optimizer) if self.sharded else cast(Stateful, optimizer)
        if state is not None:
            state.restore({"optimizer": self.optimizer})

    def load_validation(self, state: TrainingState | None) -> None:
        """Load the evaluations that a checkpoint holds."""
        if state is not None and self.validation is not None:
            self.validation.restore(state.parts["validation"])

    def validate(self, step: int, last: int) -> None:
        """Evaluate the model after `step`, which counts from 1, if an evaluation is due."""
        if self.validation is not None and self.validation.is_due(step, last):
            self.validation.evaluate(step, lambda: _copied(_model_parts(self.model)))

    def restore_best(self) -> None:
        """Load the parameters of the step with the best evaluation, if there was one."""
        if self.validation is not None and self.validation.best_parts is not None:
            _restore_model(self.model, self.validation.best_parts)

    def save(self) -> Path | None:
        """Write a checkpoint, by the first process; return its path in that process, None in others."""
        if self.folder is None or self.optimizer is None or not (self.workers.first or self.sharded):
            return None
        parts: dict[str, Any] = {
            "settings": self.identity,
            "optimizer": self.optimizer,
            "records": [asdict(record) for record in self.records],
        }
        if self.validation is not None:
            parts["validation"] = self.validation.state()
        parts |= _model_parts(self.model)
        if self.sharded:
            parts = gathered({**parts, "optimizer": self.optimizer.state_dict()}, keep=self.workers.first)
        return save_training_state(self.folder, len(self.records), parts) if self.workers.first else None


def run_identity(
    config: TrainConfig,
    examples: Sequence[Example],
    validation: Validation | None,
    settings: Mapping[str, Any] | None,
) -> str:
    """Return the settings that must not change between runs of one training, as JSON."""
    values = {
        **asdict(config),
        "checkpoint_every": None,
        "examples": fingerprint(examples),
        # Runs without evaluations keep the settings that checkpoints of earlier versions hold.
        **({"eval_every": validation.every, "patience": validation.patience} if validation else {}),
        **(settings or {}),
    }
    return json.dumps(values, sort_keys=True)


def fingerprint(examples: Sequence[Example]) -> str:
    """Return 16 hex digits that depend on all tokens and labels of the examples and on their order."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.input_ids, example.labels):
            digest.update(len(ids).to_bytes(8, "little") + ids.contiguous().numpy().tobytes())
        if example.lengths is not None:
            digest.update(str(example.lengths).encode())
    return digest.hexdigest()[:16]


def _check_unused(checkpoints: Path, workers: Workers) -> None:
    found = next(iter(sorted(checkpoints.glob("step-*.safetensors"))), None)
    workers.wait()  # before one of them writes the first checkpoint
    if found is not None:
        raise ResumeError(
            f"train: checkpoints must hold no other run's checkpoints, got {found}; resume that run, use another "
            "folder, or remove them"
        )


def _check_identity(place: str, state: TrainingState, identity: str) -> None:
    saved, wanted = json.loads(state.parts["settings"]), json.loads(identity)
    for key in {"examples", "base"} & wanted.keys():  # absent in checkpoints of older versions
        saved.setdefault(key, wanted[key])
    changed = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if changed:
        differences = ", ".join(f"{key} ({saved.get(key)} -> {wanted.get(key)})" for key in changed)
        raise ResumeError(f"{place}: a resumed run must keep its settings, got another {differences}")


def _copied(value: Any) -> Any:
    """Return a copy of nested dicts and lists with tensors, which the next step would change in place."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _model_parts(model: nn.Module) -> dict[str, Any]:
    """Return the trained parameters and the state of PEFT methods, such as AdaLoRA's importances."""
    return {
        "trained": {name: parameter.detach() for name, parameter in trained_parameters(model).items()},
        "methods": [method.training_state() for method in _methods(model)],
    }


def _restore_model(model: nn.Module, parts: Mapping[str, Any]) -> None:
    """Restore the result of `_model_parts`."""
    for method, (values, tensors) in zip(_methods(model), parts["methods"], strict=True):
        method.load_training_state(values, tensors)
    trained, saved = trained_parameters(model), parts["trained"]
    if trained.keys() != saved.keys():
        other = sorted(trained.keys() ^ saved.keys())
        raise ResumeError(f"train: the checkpoint must hold the parameters that are trained, {other[0]} differs")
    with torch.no_grad():
        for name, parameter in trained.items():
            copy_into(parameter, saved[name])


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _methods(model: nn.Module) -> list[Method]:
    if not isinstance(model, PeftModel):
        return []
    return [method for name in model.active_adapters for method in model.injector.adapters[name]]
