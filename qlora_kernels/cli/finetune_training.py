"""The training stage of `qlora-kernels finetune`: the loop, its evaluations, trackers, interruption and resumption."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .. import PagedAdamW, prepare_for_training
from ..distributed.block_sharding import held_bytes_of, shard_blocks
from ..io.atomic import folder_appearing_by_rename
from ..peft import PeftConfig, PeftModel, get_peft_model
from ..training import ChunkedLoss, Evaluated, Example, Interrupted, StepRecord, Validation, Workers, perplexity, train
from .arguments import UsageError, bad_input
from .console import Console, megabytes, memory_now
from .finetune_options import FinetuneOptions
from .finetune_report import FinetuneReport
from .interrupts import Interrupt
from .launcher import Sharding
from .trackers import Trackers


def checkpoint_folder(out: Path) -> Path:
    """Return where a run keeps its checkpoints."""
    return out / "checkpoints"


def has_checkpoints(out: Path) -> bool:
    """Return whether a run left checkpoints in its folder."""
    return any(checkpoint_folder(out).glob("step-*.safetensors"))


def check_no_other_run(options: FinetuneOptions) -> None:
    """Raise UsageError if checkpoints of another run exist and no option says how to treat them."""
    if has_checkpoints(options.out) and not (options.resume or options.overwrite):
        raise UsageError(
            f"--out: {checkpoint_folder(options.out)} must hold no other run's checkpoints; use --resume to continue "
            "that run, --overwrite to delete its checkpoints, or another --out"
        )


@dataclass
class TrainingStage:
    """Trains an adapter on a model, and fills the report.

    unseen: examples for evaluations. pad_token_id: id at padded positions, which are masked. device: the model's
    device.
    """

    options: FinetuneOptions
    console: Console
    workers: Workers
    report: FinetuneReport
    adapter_config: PeftConfig
    pad_token_id: int
    unseen: list[Example]
    device: torch.device

    def run(self, model: nn.Module, examples: list[Example], interrupt: Interrupt) -> PeftModel:
        """Return the adapted model; with evaluations its adapter is that of the best step.

        Raises training.Interrupted, after a checkpoint was written, if `interrupt` has received a signal.
        """
        options = self.options
        torch.manual_seed(options.seed)
        checkpointing: Literal["non_reentrant", False] = "non_reentrant" if options.gradient_checkpointing else False
        with bad_input():
            # Norms stay in the compute dtype, because fp32 norms would make the whole residual stream fp32.
            prepared = prepare_for_training(model, upcast="none", gradient_checkpointing=checkpointing)
            adapted = get_peft_model(prepared, self.adapter_config)
        self.report.trainable = adapted.get_nb_trainable_parameters()[0]
        self.console.say(f"training {self.report.trainable:,} parameters for {options.steps} steps")
        if options.sharding is not None:
            self._shard(adapted)
        self._remove_overwritten()
        loss = ChunkedLoss(adapted)
        self._trackers = self._start_trackers()
        self._validation = self._make_validation(loss)
        with (
            bad_input(),
            closing(self._trackers),
            self.console.stage("train"),
            self.console.bar(options.steps, "training", "step") as bar,
        ):
            self._bar = bar
            if options.trainer == "hf":
                self.report.steps = self._train_with_hf(loss, examples, interrupt)
            else:
                self.report.steps = train(
                    loss,
                    examples,
                    lambda trained: _optimizer(trained, options),
                    options.train_config(),
                    pad_token_id=self.pad_token_id,
                    checkpoints=checkpoint_folder(options.out),
                    settings={**options.identity(), "base": self.report.base},
                    resume=options.resume,
                    on_step=self._on_step,
                    validation=self._validation,
                    interrupted=interrupt,
                    workers=self.workers,
                )
        self._note_best()
        return adapted

    def _shard(self, adapted: PeftModel) -> None:
        sharding = self.options.sharding
        assert sharding is not None
        self.workers.start_alike([p for p in adapted.parameters() if p.requires_grad])
        with bad_input():
            blocks = shard(adapted, sharding, self.device)
        self.report.held_bytes = self.workers.gathered(held_bytes_of(adapted))
        self.console.say(
            f"sharded {blocks} blocks over {self.workers.world} processes, which hold "
            + ", ".join(megabytes(sum(held)) for held in self.report.held_bytes)
        )

    def _train_with_hf(self, loss: ChunkedLoss, examples: list[Example], interrupt: Interrupt) -> list[StepRecord]:
        from .hf_trainer import train_with_hf

        options = self.options
        try:
            return train_with_hf(
                loss,
                examples,
                _optimizer([p for p in loss.model.parameters() if p.requires_grad], options),
                options.train_config(),
                out=options.out / "trainer",
                pad_token_id=self.pad_token_id,
                on_step=self._on_step,
                interrupted=interrupt,
                workers=self.workers,
            )
        except Interrupted as stopped:
            self.save(loss.model, options.out / f"adapter-step-{stopped.step}")
            raise

    def save(self, adapted: PeftModel, folder: Path) -> None:
        """Write the adapter's folder on the first process; the others take part if the adapter is sharded."""
        if self.workers.first:
            with folder_appearing_by_rename(folder) as partial:
                adapted.save_pretrained(partial)
        elif self.options.sharding is not None:
            adapted.save_pretrained(folder, is_main_process=False)

    def remove_checkpoints(self) -> None:
        """Remove this run's checkpoints once its report is written, if none were asked for."""
        if not self.options.checkpoint_every:
            shutil.rmtree(checkpoint_folder(self.options.out), ignore_errors=True)

    def _remove_overwritten(self) -> None:
        if self.options.overwrite and not self.options.resume and self.workers.first:
            shutil.rmtree(checkpoint_folder(self.options.out), ignore_errors=True)
        self.workers.wait()

    def _start_trackers(self) -> Trackers:
        options = self.options
        names = options.track if self.workers.first else ()
        return Trackers(names, options.out, options.project, options.run_name or options.out.name, self.report.options)

    def _make_validation(self, loss: ChunkedLoss) -> Validation | None:
        options = self.options
        if not options.eval_every:
            return None
        batch = options.micro_batch or options.batch

        def measure() -> float:
            started = time.perf_counter()
            value = perplexity(loss, self.unseen, batch, self.pad_token_id, workers=self.workers).value
            spent = self.console.stages
            spent["evaluate while training"] = spent.get("evaluate while training", 0.0) + time.perf_counter() - started
            return value

        return Validation(measure, options.eval_every, options.patience, self._on_evaluated)

    def _on_evaluated(self, record: Evaluated) -> None:
        self.report.evaluations.append({"step": record.step, "perplexity": record.value})
        self.console.say(f"step {record.step}: perplexity {record.value:.3f}")
        self._trackers.log(record.step, {"eval/perplexity": record.value})

    def _on_step(self, step: StepRecord) -> None:
        speed = step.tokens / step.seconds
        line = f"loss {step.loss:.4f}, {speed:,.0f} tokens/s, {memory_now(self.device)}"
        self._bar.set_postfix_str(line, refresh=False)
        self._bar.update()
        if self._bar.disable and step.step % max(self.options.steps // 8, 1) == 0:
            self.console.say(f"step {step.step}: {line}")
        values = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, "tokens_per_second": speed}
        self._trackers.log(step.step, {f"train/{name}": value for name, value in values.items()})

    def _note_best(self) -> None:
        validation = self._validation
        if validation is None or validation.best is None:
            return
        best = validation.best
        self.report.best = {"step": best.step, "perplexity": best.value, "why": validation.reason()}
        self.console.say(f"the adapter is that of step {best.step}: {validation.reason()}")


def shard(model: nn.Module, sharding: Sharding, device: torch.device) -> int:
    """Shard a model as the options say, and return the number of its blocks."""
    return len(
        shard_blocks(
            model,
            device,
            block_classes=sharding.block_classes,
            reshard_after_forward=sharding.reshard_after_forward,
        )
    )


def _optimizer(trained: list[nn.Parameter], options: FinetuneOptions) -> torch.optim.Optimizer:
    kind: Any = PagedAdamW if options.optimizer == "paged_adamw" else torch.optim.AdamW
    optimizer: torch.optim.Optimizer = kind(trained, lr=options.lr, weight_decay=options.weight_decay)
    return optimizer
