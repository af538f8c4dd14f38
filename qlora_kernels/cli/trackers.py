"""Experiment trackers by name: TensorBoard, Weights & Biases, trackio, each through its own library."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arguments import UsageError


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError for a tracker whose library is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--track {name}: {name} must be installed; run `pip install {name}`")


class Trackers:
    """Gives every tracker the figures of a run.

    names: of choices.TRACKERS.   out: the run's folder, where TensorBoard's files lie.   project, run: names that wandb
    and trackio show.   settings: the run's options.
    A resumed run gives the figures of the earlier steps again, so that each curve is whole.
    A tracker that fails is left out from then on, with a warning: no training is lost to a network that is down.
    """

    def __init__(self, names: Sequence[str], out: Path, project: str, run: str, settings: Mapping[str, Any]) -> None:
        self.sinks: dict[str, Any] = {}
        for name in names:
            self._attempt(name, lambda name=name: self._start(name, out, project, run, settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Give every tracker the values of a step."""
        for name, sink in list(self.sinks.items()):
            if name == "tensorboard":
                self._attempt(name, lambda sink=sink: _write_scalars(sink, step, values))
            else:
                self._attempt(name, lambda sink=sink: sink.log(dict(values), step=step))

    def close(self) -> None:
        """Write what is left, and end the runs."""
        for name, sink in list(self.sinks.items()):
            self._attempt(name, sink.close if name == "tensorboard" else sink.finish)
        self.sinks.clear()

    def _start(self, name: str, out: Path, project: str, run: str, settings: Mapping[str, Any]) -> None:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides the events of an earlier attempt at this run, whose figures are given again.
            self.sinks[name] = SummaryWriter(str(out / "tensorboard"), purge_step=0)
            return
        library = importlib.import_module(name)
        folder = {"dir": str(out)} if name == "wandb" else {}
        library.init(project=project, name=run, config=dict(settings), **folder)
        self.sinks[name] = library

    def _attempt(self, name: str, action: Any) -> None:
        try:
            action()
        except Exception as error:  # of any kind: the libraries raise their own
            self.sinks.pop(name, None)
            warnings.warn(f"--track {name} failed and is left out: {' '.join(str(error).split())[:300]}", stacklevel=2)


def _write_scalars(writer: Any, step: int, values: Mapping[str, float]) -> None:
    for key, value in values.items():
        writer.add_scalar(key, value, step)
