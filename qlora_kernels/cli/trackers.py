"""Experiment trackers by name: TensorBoard, Weights & Biases and trackio, each through its library."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from .arguments import UsageError


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError for a tracker whose library is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder wandb/, as wandb makes one, is not the library
            raise UsageError(f"--track {name}: {name} must be installed; run `pip install {name}`")


class Trackers:
    """Sends the metrics of a run to every tracker.

    names: some of choices.TRACKERS. out: the run's folder, for TensorBoard's files. project, run: names shown by wandb
    and trackio. settings: the run's options.
    A resumed run sends the metrics of the earlier steps again, so that each curve is complete.
    What the libraries print goes to standard error, because --json prints one object to standard output.
    A tracker that fails is disabled with a warning, so that a network error does not end the training.
    """

    def __init__(self, names: Sequence[str], out: Path, project: str, run: str, settings: Mapping[str, Any]) -> None:
        self.sinks: dict[str, Any] = {}
        for name in names:
            self._attempt(name, lambda name=name: self._start(name, out, project, run, settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step to every tracker."""
        for name, sink in list(self.sinks.items()):
            if name == "tensorboard":
                self._attempt(name, lambda sink=sink: _write_scalars(sink, step, values))
            else:
                self._attempt(name, lambda sink=sink: sink.log(dict(values), step=step))

    def close(self) -> None:
        """Write pending values and end the runs."""
        for name, sink in list(self.sinks.items()):
            self._attempt(name, sink.close if name == "tensorboard" else sink.finish)
        self.sinks.clear()

    def _start(self, name: str, out: Path, project: str, run: str, settings: Mapping[str, Any]) -> None:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides the events of an earlier attempt at this run, whose metrics are sent again.
            self.sinks[name] = SummaryWriter(str(out / "tensorboard"), purge_step=0)
            return
        library = importlib.import_module(name)
        folder = {"dir": str(out)} if name == "wandb" else {}
        self.sinks[name] = library.init(project=project, name=run, config=dict(settings), **folder)

    def _attempt(self, name: str, action: Any) -> None:
        try:
            with redirect_stdout(sys.stderr):
                action()
        except Exception as error:  # any kind: the libraries raise their own errors
            self.sinks.pop(name, None)
            warnings.warn(f"--track {name} failed and is left out: {' '.join(str(error).split())[:300]}", stacklevel=2)


def _write_scalars(writer: Any, step: int, values: Mapping[str, float]) -> None:
    for key, value in values.items():
        writer.add_scalar(key, value, step)
