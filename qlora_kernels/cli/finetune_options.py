"""The options of one run of `qlora-kernels finetune`, and what they mean to training and to the adapter."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import dtype_of
from .choices import Schedule

if TYPE_CHECKING:
    import torch

    from ..peft import PeftConfig
    from ..training import TrainConfig


@dataclass(frozen=True)
class FinetuneOptions:
    """One field for each option of the command line, by its name there."""

    model: str
    data: str
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
    timeout: int
    unseen: float
    eval_windows: int
    prompt: str | None
    max_new_tokens: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> FinetuneOptions:
        """From parsed arguments, which hold more than the options. --device and --compute-dtype are resolved."""
        from .device import chosen_device, chosen_dtype  # imports torch

        values = {name: getattr(arguments, name) for name in cls.__dataclass_fields__}
        device = chosen_device(arguments.device, os.environ)
        values |= {"device": str(device), "compute_dtype": chosen_dtype(arguments.compute_dtype, device)}
        return cls(**values)

    @property
    def dtype(self) -> torch.dtype:
        """Of matmuls and dense weights."""
        return dtype_of(self.compute_dtype)

    @property
    def cache_folder(self) -> Path:
        """Where converted models are kept."""
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
        """What must be equal for a resumed run to be the same run: all that losses depend on."""
        free = {"eval_windows", "prompt", "max_new_tokens"}
        return {name: value for name, value in self.result_options().items() if name not in free}

    def result_options(self) -> dict[str, Any]:
        """All that the adapter and the report depend on."""
        free = {"out", "cache", "json", "device", "checkpoint_every", "resume", "timeout"}
        if not self.fuse:  # runs of versions without the option can be resumed
            free.add("fuse")
        return {name: value for name, value in asdict(self).items() if name not in free}
