"""The options of one run of `qlora-kernels finetune`, and the configurations of training and adapter made from them."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import UsageError, dtype_of
from .choices import Schedule
from .launcher import Sharding, processes, sharding_of

if TYPE_CHECKING:
    import torch

    from ..peft import PeftConfig
    from ..training import TrainConfig


PACKABLE = ("lora", "adalora", "bitfit", "bottleneck_adapter", "ia3", "vera", "loha", "lokr", "oft", "boft")
"""Methods that compute each token separately, so that packed examples do not affect each other."""


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of the command line; each field has the name of its option."""

    model: str
    data: str
    split: str | None
    trainer: str
    packing: bool
    out: Path
    cache: Path | None
    json: bool
    device: str
    compute_dtype: str
    blocksize: int
    double_quant: bool
    skip: tuple[str, ...]
    method: str
    r: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...] | str
    set: list[tuple[str, Any]]
    steps: int
    epochs: float | None
    batch: int
    micro_batch: int
    seq_len: int
    lr: float
    warmup: int
    schedule: Schedule
    clip: float
    weight_decay: float
    optimizer: str
    seed: int
    gradient_checkpointing: bool
    fuse: bool
    checkpoint_every: int
    resume: bool
    overwrite: bool
    fsdp: bool | None
    timeout: int
    unseen: float
    eval_windows: int
    eval_every: int
    patience: int
    track: tuple[str, ...]
    project: str
    run_name: str | None
    prompt: str | None
    max_new_tokens: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> FinetuneOptions:
        """Return the options in parsed arguments, which also hold other values. --device and --compute-dtype are
        resolved.
        """
        from .device import chosen_device, chosen_dtype  # imports torch

        values = {name: getattr(arguments, name) for name in cls.__dataclass_fields__}
        device = chosen_device(arguments.device, os.environ)
        values |= {"device": str(device), "compute_dtype": chosen_dtype(arguments.compute_dtype, device)}
        return cls(**values)

    def check(self) -> None:
        """Raise UsageError for options that contradict each other."""
        if self.patience and not self.eval_every:
            raise UsageError("--patience: must come with --eval-every, whose evaluations it counts")
        if self.eval_every and not (self.eval_windows and (self.unseen or self.data == "builtin")):
            raise UsageError("--eval-every: must have unseen text; use an --unseen and --eval-windows above 0")

        if self.sharding is not None:
            self._check_sharding()
        if self.trainer == "hf":
            self._check_trainer()
        if self.packing and self.method not in PACKABLE:
            raise UsageError(
                f"--packing: must come with a method of {', '.join(PACKABLE)}, got {self.method}; others put tokens or "
                "states before a text, which packed examples would not each have"
            )

    def _check_trainer(self) -> None:
        refused = [name for name in ("checkpoint_every", "resume", "eval_every") if getattr(self, name)]
        if refused:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in refused)
            raise UsageError(f"--trainer hf: must come without {names}, which need the exact loop of --trainer own")
        if self.device not in ("cpu", "cuda", "cuda:0") and processes(os.environ) == 1:
            raise UsageError(f"--trainer hf: must run on the CPU or the first CUDA device, got --device {self.device}")

    @property
    def sharding(self) -> Sharding | None:
        """How the model is sharded over the processes; None where each holds the whole model."""
        return sharding_of(self.fsdp, os.environ)

    def _check_sharding(self) -> None:
        from ..distributed.shardable import check_torch

        try:
            check_torch("--fsdp")
        except NotImplementedError as error:
            raise UsageError(str(error)) from error

    def steps_of(self, examples: int) -> int:
        """Return the number of steps of --epochs passes over so many examples; the last batch is filled from the next
        pass.
        """
        if self.epochs is None:
            return self.steps
        return max(math.ceil(round(self.epochs * examples, 6) / self.batch), 1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matmuls and dense weights."""
        return dtype_of(self.compute_dtype)

    @property
    def cache_folder(self) -> Path:
        """The folder in which converted models are cached."""
        return self.cache or self.out / "cache"

    def train_config(self) -> TrainConfig:
        """Return the configuration that training.train takes."""
        from ..training import TrainConfig

        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch,
            micro_batch=self.micro_batch,
            lr=self.lr,
            warmup_steps=self.warmup,
            schedule=self.schedule,
            max_grad_norm=self.clip,
            checkpoint_every=self.checkpoint_every,
            seed=self.seed,
        )

    def adapter_config(self) -> PeftConfig:
        """Return the adapter configuration that --method and its options name."""
        from .methods import adapter_config

        options = {
            "r": self.r,
            "lora_r": self.r,
            "target_r": self.r,
            "init_r": self.r + (self.r + 1) // 2,
            # Before the examples are counted, only options that are wrong for any number of steps can be refused.
            "total_step": self.steps,
            "lora_alpha": self.alpha,
            "alpha": self.alpha,
            "lora_dropout": self.dropout,
            "vera_dropout": self.dropout,
            "dropout": self.dropout,
            "target_modules": self.target_modules,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.model,
        }
        return adapter_config(self.method, options, dict(self.set))

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the first run: all options on which losses depend."""
        free = {"eval_windows", "prompt", "max_new_tokens"}
        return {name: value for name, value in self.result_options().items() if name not in free}

    def result_options(self) -> dict[str, Any]:
        """The options on which the adapter and the report depend."""
        # --epochs is included in the steps.
        free = {"out", "cache", "json", "device", "checkpoint_every", "resume", "timeout", "epochs", "overwrite"}
        free |= {"track", "project", "run_name", "fsdp"}
        # Runs of versions without these options can be resumed.
        later = {"fuse": False, "eval_every": 0, "patience": 0, "split": None, "packing": False, "trainer": "own"}
        free |= {name for name, default in later.items() if getattr(self, name) == default}
        return {name: value for name, value in asdict(self).items() if name not in free}
