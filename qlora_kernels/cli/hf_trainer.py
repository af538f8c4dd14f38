"""`--trainer hf`: runs the recipe of the package's training loop in transformers' Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..training import BatchOrder, ChunkedLoss, Example, Interrupted, StepRecord, TrainConfig, collate
from ..training.batches import Batch
from ..training.schedule import factor


class _MicroBatches(Dataset[Batch]):
    """The micro batches of the package's training loop, in its order. of_step: number of micro batches in one step."""

    def __init__(self, examples: Sequence[Example], config: TrainConfig, pad_token_id: int) -> None:
        self.examples, self.config, self.pad_token_id = examples, config, pad_token_id
        self.order = BatchOrder(len(examples), config.batch_size, config.seed)
        self.size = config.micro_batch or config.batch_size
        self.of_step = -(-config.batch_size // self.size)

    def __len__(self) -> int:
        return self.config.steps * self.of_step

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        step, part = divmod(index, self.of_step)
        chosen = [self.examples[i] for i in self.order.indices(step)]
        batch = collate(chosen[part * self.size : (part + 1) * self.size], self.pad_token_id)
        # The first token of an example is not predicted.
        learned = sum(int((example.labels[1:] != -100).sum()) for example in chosen)
        return {**batch._asdict(), "learned": learned}


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
) -> list[StepRecord]:
    """Train as `training.train` does, in transformers' Trainer, and return every step's record.

    Examples, their order, the loss, the schedule, clipping and the optimizer are those of training.train, so that
    losses agree up to roundings without dropout; with dropout the masks differ. Trainer counts steps, accumulates
    gradients, clips, and steps the optimizer.
    out: Trainer's output_dir; nothing is written to it. interrupted: called after every step; if it returns True,
    Interrupted is raised, without a checkpoint.
    Raises FloatingPointError for a loss that is not finite.
    """
    import transformers

    micro_batches = _MicroBatches(examples, config, pad_token_id)
    records: list[StepRecord] = []

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        """Ends training after the step during which a signal arrived."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            control.should_training_stop = control.should_training_stop or interrupted()

    class Trainer(transformers.Trainer):  # type: ignore[misc]
        """Trainer over the exact loop's batches and loss."""

        mean, tokens, started = 0.0, 0, time.perf_counter()

        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(micro_batches, batch_size=None, shuffle=False)

        def training_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
            model.train()
            learned = inputs.pop("learned")
            batch = Batch(**inputs).to(next(loss.model.parameters()).device)
            value = loss(batch) / learned
            self.mean += value.item()
            self.tokens += batch.input_ids.numel()
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"train: the loss of step {len(records) + 1} must be finite, got {value.item()}; use a smaller lr"
                )
            value.backward()
            return cast(torch.Tensor, value.detach())

        def log(self, logs: dict[str, Any], *_: Any, **__: Any) -> None:
            if "grad_norm" not in logs:
                return  # the summary at the end
            step = len(records)
            lr = config.lr * factor(config.schedule, step, config.steps, config.warmup_steps)
            now = time.perf_counter()
            records.append(
                StepRecord(step + 1, self.mean, lr, float(logs["grad_norm"]), self.tokens, now - self.started)
            )
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
    trainer = Trainer(loss.model, arguments, optimizers=(optimizer, schedule), callbacks=[Stop()])
    trainer.train_dataset = micro_batches
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    if len(records) < config.steps:
        raise Interrupted(len(records), config.steps, None)
    return records
