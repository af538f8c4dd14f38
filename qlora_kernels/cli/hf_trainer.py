"""`--trainer hf`: runs the recipe of the package's training loop in transformers' Trainer."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..training import BatchOrder, ChunkedLoss, Example, Interrupted, StepRecord, TrainConfig, Workers, collate
from ..training.batches import Batch
from ..training.schedule import factor
from ..training.sharded_model import clip_gradients, idle_batch, is_sharded, sum_gradients
from ..training.workers import ONE_PROCESS


class _MicroBatches(Dataset[Batch]):
    """The micro batches of one process in the package's training loop, in its order.

    of_step: number of micro batches of a step, which is equal in all processes.
    """

    def __init__(
        self, examples: Sequence[Example], config: TrainConfig, pad_token_id: int, workers: Workers = ONE_PROCESS
    ) -> None:
        self.examples, self.config, self.pad_token_id, self.workers = examples, config, pad_token_id, workers
        self.order = BatchOrder(len(examples), config.batch_size, config.seed)
        most = -(-config.batch_size // self.workers.world)
        self.size = config.micro_batch or most
        self.of_step = -(-most // self.size)

    def __len__(self) -> int:
        return self.config.steps * self.of_step

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        step, part = divmod(index, self.of_step)
        chosen = [self.examples[i] for i in self.order.indices(step)]
        own = self.workers.share(chosen)[part * self.size : (part + 1) * self.size]
        batch = collate(own, self.pad_token_id) if own else idle_batch(collate(chosen[:1], self.pad_token_id))
        # The first token of an example is not predicted.
        learned = sum(int((example.labels[1:] != -100).sum()) for example in chosen)
        return {**batch._asdict(), "learned": learned, "tokens": batch.input_ids.numel() if own else 0}


def train_with_hf(
    loss: ChunkedLoss,
    examples: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    out: Path,
    pad_token_id: int,
    on_step: Callable[[StepRecord], object],
    interrupted: Callable[[], bool],
    workers: Workers = ONE_PROCESS,
) -> list[StepRecord]:
    """Train as `training.train` does, in transformers' Trainer, and return every step's record.

    Examples, their order, the loss, the schedule, clipping and the optimizer are those of training.train, so that
    losses agree up to roundings without dropout; with dropout the masks differ. Trainer counts steps, accumulates
    gradients, clips, and steps the optimizer.
    out: Trainer's output_dir; nothing is written to it. interrupted: called after every step; if it returns True,
    Interrupted is raised, without a checkpoint.
    workers: the processes that share every batch. Each has the whole model, whose gradients are summed here, or its
    shards of it after `fully_shard`, which sums them. accelerate wraps neither.
    Raises FloatingPointError for a loss that is not finite.
    """
    import transformers

    micro_batches = _MicroBatches(examples, config, pad_token_id, workers)
    sharded = is_sharded(loss.model)
    sum_gradients(loss.model)
    records: list[StepRecord] = []

    class Callback(transformers.TrainerCallback):  # type: ignore[misc]
        """Advances the schedules of methods, and ends training after the step during which a signal arrived."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            loss.model.step(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            stops = bool(workers.total(float(interrupted())))
            control.should_training_stop = control.should_training_stop or stops

    class Trainer(transformers.Trainer):  # type: ignore[misc]
        """Trainer over the exact loop's batches and loss."""

        mean, tokens, started = 0.0, 0, time.perf_counter()

        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(micro_batches, batch_size=None, shuffle=False)

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if workers.world > 1:
                self.accelerator.prepare = lambda *parts, **_: parts if len(parts) > 1 else parts[0]
                self.accelerator.prepare_model = lambda model, **_: model

        def _wrap_model(self, model: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
            return model if workers.world > 1 else super()._wrap_model(model, *arguments, **options)

        def _clip_grad_norm(self, model: nn.Module) -> Any:
            if workers.world == 1:
                return super()._clip_grad_norm(model)
            return self._norm(self.args.max_grad_norm)

        def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
            if workers.world == 1:
                return super()._get_grad_norm(model, grad_norm)
            return self._norm(float("inf")) if grad_norm is None else grad_norm

        def _norm(self, max_norm: float) -> float:
            """Sum the gradients over the processes, clip them, and return their norm."""
            trained = [p for p in loss.model.parameters() if p.requires_grad]
            if not sharded:
                workers.sum_gradients(trained)
            return clip_gradients(trained, max_norm)

        def training_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
            model.train()
            if self.tokens == 0:
                workers.seed(config.seed, len(records))
            learned, tokens = inputs.pop("learned"), inputs.pop("tokens")
            batch = Batch(**inputs).to(next(loss.model.parameters()).device)
            value = loss(batch) / learned
            self.mean += value.item()
            self.tokens += tokens
            if workers.world == 1:
                self._check(value.item())
            (value + loss.model.peft_loss() / (micro_batches.of_step * workers.world)).backward()
            return cast(torch.Tensor, value.detach())

        def _check(self, value: float) -> None:
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"train: the loss of step {len(records) + 1} must be finite, got {value}; use a smaller lr"
                )

        def log(self, logs: dict[str, Any], *_: Any, **__: Any) -> None:
            if "grad_norm" not in logs:
                return  # the summary at the end
            step = len(records)
            lr = config.lr * factor(config.schedule, step, config.steps, config.warmup_steps)
            now = time.perf_counter()
            mean, tokens = workers.total(self.mean), int(workers.total(self.tokens))
            self._check(mean)
            records.append(StepRecord(step + 1, mean, lr, float(logs["grad_norm"]), tokens, now - self.started))
            self.mean, self.tokens, self.started = 0.0, 0, now
            on_step(records[-1])

    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        gradient_accumulation_steps=micro_batches.of_step,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed % 2**32,  # upper bound of numpy's seeds
        use_cpu=next(loss.model.parameters()).device.type == "cpu",
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(config.schedule, step, config.steps, config.warmup_steps)
    )
    with _without_fsdp_of_accelerate():  # the model is sharded already
        trainer = Trainer(loss.model, arguments, optimizers=(optimizer, schedule), callbacks=[Callback()])
    trainer.train_dataset = micro_batches
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    if len(records) < config.steps:
        raise Interrupted(len(records), config.steps, None)
    return records


@contextmanager
def _without_fsdp_of_accelerate() -> Iterator[None]:
    """Inside, accelerate does not see that its launcher was given an FSDP configuration."""
    saved = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if saved is not None:
            os.environ["ACCELERATE_USE_FSDP"] = saved
