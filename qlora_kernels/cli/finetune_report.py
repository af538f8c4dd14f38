"""The report of `qlora-kernels finetune`: a table, a JSON file, and a plot of the loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..io.atomic import file_appearing_by_rename
from ..training import RowCounts, StepRecord
from .console import megabytes
from .tables import table


@dataclass
class FinetuneReport:
    """The results of a run, filled in by the steps of the command.

    rows: part of the data ("train", "unseen") -> numbers of rows that were kept, cut and dropped, with reasons.
    perplexity: on the unseen text, by model. predictions: number of tokens in each mean.
    fused: names of the modules that --fuse replaced.
    device: device of the model. peak_device_bytes: peak of the bytes of tensors on it; 0 for the CPU.
    held_bytes: of each process of a sharded run, its bytes of the base and of the trained parameters.
    evaluations: step -> perplexity during training. best: the step whose adapter is kept, and the reason; empty without
    evaluations.
    bytes_dense: bytes of the quantized layers' weights in 16 bits. bytes_nf4: bytes of their packed indices and
    constants.
    step_seconds: seconds of a training step without the optimizer, "plain" and "fused"; empty if not measured.
    seconds: stage -> seconds. options: the options on which the results depend, in addition to the fingerprints of the
    NF4 folder (`base`) and of the examples (`examples`).
    """

    model: str
    data: str
    out: str
    device: str = "cpu"
    rows: dict[str, RowCounts] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    predictions: int = 0
    layers: int = 0
    bytes_dense: int = 0
    bytes_nf4: int = 0
    trainable: int = 0
    fused: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    step_seconds: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0
    sample: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    examples: str = ""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    held_bytes: list[tuple[int, int]] = field(default_factory=list)

    def result_of(self) -> tuple[object, ...]:
        """Return the fields that are equal in two reports of the same run."""
        return self.options, self.base, self.examples

    @classmethod
    def of(cls, values: dict[str, Any]) -> FinetuneReport:
        """Return the report in an object that to_json wrote. Raises TypeError or KeyError for any other object."""
        later: dict[str, Any] = {  # reports of earlier versions lack them
            "fused": 0,
            "device": "cpu",
            "peak_device_bytes": 0,
            "evaluations": [],
            "best": {},
            "step_seconds": {},
            "held_bytes": [],
        }
        own = {name: {**later, **values}[name] for name in cls.__dataclass_fields__}
        own["rows"] = {part: RowCounts(**counts) for part, counts in own["rows"].items()}
        own["steps"] = [StepRecord(**step) for step in own["steps"]]
        return cls(**own)

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens divided by the seconds of the steps."""
        return sum(step.tokens for step in self.steps) / max(sum(step.seconds for step in self.steps), 1e-9)

    def _gain(self) -> str:
        plain, fused = self.step_seconds["plain"], self.step_seconds["fused"]
        return f"{fused:.2f} s, without it {plain:.2f} s ({plain / fused:.2f}x), measured in turns after the training"

    def _held(self) -> str:
        base, trained = (max(held[i] for held in self.held_bytes) for i in range(2))
        of = f"{len(self.held_bytes)} processes"
        return f"at most {megabytes(base)} of the base and {megabytes(trained)} of the adapter, {of}"

    def to_json(self) -> str:
        """Return the whole report as one line of JSON."""
        return json.dumps({**asdict(self), "tokens_per_second": self.tokens_per_second})

    def table(self) -> str:
        """Return the report as a text table."""
        rows = [(f"data, {part}", str(counts)) for part, counts in self.rows.items()]
        if self.perplexity:
            rows.append(("perplexity on unseen text", f"({self.predictions:,} predictions)"))
            rows += [(f"  {name}", f"{value:.3f}") for name, value in self.perplexity.items()]
        ratio = self.bytes_dense / max(self.bytes_nf4, 1)
        rows += [
            (
                f"weights of {self.layers} linear layers",
                f"{megabytes(self.bytes_dense)} in 16 bits -> {megabytes(self.bytes_nf4)} in NF4 ({ratio:.2f}x)",
            ),
            *([("held by each process", self._held())] if self.held_bytes else []),
            ("trained parameters", f"{self.trainable:,}"),
            *([("fused modules", f"{self.fused}")] if self.fused else []),
            ("loss", f"{self.steps[0].loss:.4f} -> {self.steps[-1].loss:.4f} in {len(self.steps)} steps"),
            *([("adapter", f"of step {self.best['step']}: {self.best['why']}")] if self.best else []),
            ("training", f"{self.tokens_per_second:,.0f} tokens/s"),
            *([("step with --fuse", self._gain())] if self.step_seconds else []),
            ("time", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())),
            ("peak memory (RSS)", megabytes(self.peak_rss_bytes)),
            *([(f"peak memory ({self.device})", megabytes(self.peak_device_bytes))] if self.peak_device_bytes else []),
            ("written to", f"{self.out}: adapter/, {'loss.png, ' if can_plot() else ''}report.json, run.yaml"),
        ]
        lines = [table(rows), *(f"note: {note}" for note in self.notes)]
        if self.sample:
            lines += ["", f"prompt:       {self.sample['prompt']!r}", f"continuation: {self.sample['text']!r}"]
        return "\n".join(lines)


@cache
def can_plot() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def write_loss_curve(path: Path, steps: Sequence[StepRecord]) -> None:
    """Write a PNG of loss and learning rate over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    loss_axis = figure.subplots()
    xs = [step.step for step in steps]
    loss_axis.plot(xs, [step.loss for step in steps], color="tab:blue")
    loss_axis.set_xlabel("step")
    loss_axis.set_ylabel("loss (nats per token)", color="tab:blue")
    lr_axis = loss_axis.twinx()
    lr_axis.plot(xs, [step.lr for step in steps], color="tab:gray", linewidth=0.8)
    lr_axis.set_ylabel("learning rate", color="tab:gray")
    with file_appearing_by_rename(path) as partial:
        figure.savefig(partial, dpi=120)
