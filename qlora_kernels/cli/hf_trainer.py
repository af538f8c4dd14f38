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

from ..rounding import cdiv
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
        most = cdiv(config.batch_size, self.workers.world)
        self.size = config.micro_batch or most
        self.of_step = cdiv(most, self.size)

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
    sum_gradients(loss.model)
    recipe = _Recipe(loss, config, micro_batches, on_step)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.lr_factor)
    with _without_fsdp_of_accelerate():  # the model is sharded already
        trainer = _trainer_class(recipe)(
            loss.model,
            _arguments(recipe, out),
            optimizers=(optimizer, schedule),
            callbacks=[_callback_class(recipe, interrupted)()],
        )
    trainer.train_dataset = micro_batches
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    if len(recipe.records) < config.steps:
        raise Interrupted(len(recipe.records), config.steps, None)
    return recipe.records


class _Recipe:
    """The parts of `training.train`'s step that transformers' Trainer does not compute, and the steps' records.

    mean, tokens: the loss and the number of tokens of the current step so far, in this process.
    """

    def __init__(
        self,
        loss: ChunkedLoss,
        config: TrainConfig,
        micro_batches: _MicroBatches,
        on_step: Callable[[StepRecord], object],
    ) -> None:
        self.loss, self.config, self.micro_batches, self.on_step = loss, config, micro_batches, on_step
        self.workers, self.sharded = micro_batches.workers, is_sharded(loss.model)
        self.records: list[StepRecord] = []
        self.mean, self.tokens, self.started = 0.0, 0, time.perf_counter()

    def lr_factor(self, step: int) -> float:
        """Return the learning rate of a step that counts from 0, relative to config.lr."""
        return factor(self.config.schedule, step, self.config.steps, self.config.warmup_steps)

    def backward(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Accumulate the gradient of a micro batch, and return its part of the step's loss."""
        if self.tokens == 0:
            self.workers.seed(self.config.seed, len(self.records))
        learned, tokens = inputs.pop("learned"), inputs.pop("tokens")
        batch = Batch(**inputs).to(next(self.loss.model.parameters()).device)
        value = self.loss(batch) / learned
        self.mean += value.item()
        self.tokens += tokens
        if self.workers.world == 1:
            self.check(value.item())
        auxiliary = self.loss.model.peft_loss() / (self.micro_batches.of_step * self.workers.world)
        (value + auxiliary).backward()
        return cast(torch.Tensor, value.detach())

    def clipped_norm(self, max_norm: float) -> float:
        """Sum the gradients over the processes, clip them, and return their norm."""
        trained = [p for p in self.loss.model.parameters() if p.requires_grad]
        if not self.sharded:
            self.workers.sum_gradients(trained)
        return clip_gradients(trained, max_norm)

    def check(self, value: float) -> None:
        """Raise FloatingPointError for a loss that is not finite."""
        if not math.isfinite(value):
            raise FloatingPointError(
                f"train: the loss of step {len(self.records) + 1} must be finite, got {value}; use a smaller lr"
            )

    def finish_step(self, grad_norm: float) -> None:
        """Record the current step and begin the next one."""
        step, now = len(self.records), time.perf_counter()
        mean, tokens = self.workers.total(self.mean), int(self.workers.total(self.tokens))
        self.check(mean)
        lr = self.config.lr * self.lr_factor(step)
        self.records.append(StepRecord(step + 1, mean, lr, grad_norm, tokens, now - self.started))
        self.mean, self.tokens, self.started = 0.0, 0, now
        self.on_step(self.records[-1])


def _arguments(recipe: _Recipe, out: Path) -> Any:
    """Return Trainer's arguments for the recipe: no checkpoints, no progress bar, no trackers, a log of every step."""
    import transformers

    config = recipe.config
    return transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        gradient_accumulation_steps=recipe.micro_batches.of_step,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed % 2**32,  # upper bound of numpy's seeds
        use_cpu=next(recipe.loss.model.parameters()).device.type == "cpu",
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _callback_class(recipe: _Recipe, interrupted: Callable[[], bool]) -> Any:
    """Return the class of the callback; it is made here, because transformers is imported only for `--trainer hf`."""
    import transformers

    class Callback(transformers.TrainerCallback):
        """Advances the schedules of methods, and ends training after the step during which a signal arrived."""

        def on_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            recipe.loss.model.step(state.global_step)

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            stops = bool(recipe.workers.total(float(interrupted())))
            control.should_training_stop = control.should_training_stop or stops

    return Callback


def _trainer_class(recipe: _Recipe) -> Any:
    """Return the class of the Trainer; it is made here, because transformers is imported only for `--trainer hf`."""
    import transformers

    alone = recipe.workers.world == 1

    class Trainer(transformers.Trainer):
        """Trainer over the recipe's batches, loss and clipping; several processes are not accelerate's concern."""

        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(recipe.micro_batches, batch_size=None, shuffle=False)

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if not alone:
                self.accelerator.prepare = lambda *parts, **_: parts if len(parts) > 1 else parts[0]
                self.accelerator.prepare_model = lambda model, **_: model

        def _wrap_model(self, model: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
            return super()._wrap_model(model, *arguments, **options) if alone else model

        def _clip_grad_norm(self, model: nn.Module) -> Any:
            return super()._clip_grad_norm(model) if alone else recipe.clipped_norm(self.args.max_grad_norm)

        def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
            if alone:
                return super()._get_grad_norm(model, grad_norm)
            return recipe.clipped_norm(math.inf) if grad_norm is None else grad_norm

        def training_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
            model.train()
            return recipe.backward(inputs)

        def log(self, logs: dict[str, Any], *_: Any, **__: Any) -> None:
            if "grad_norm" in logs:  # the summary at the end has none
                recipe.finish_step(float(logs["grad_norm"]))

    return Trainer


@contextmanager
def _without_fsdp_of_accelerate() -> Iterator[None]:
    """Inside, accelerate does not see that its launcher was given an FSDP configuration."""
    saved = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if saved is not None:
            os.environ["ACCELERATE_USE_FSDP"] = saved
