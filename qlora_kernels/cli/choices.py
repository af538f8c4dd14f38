"""Permitted values of options, repeated here so that arguments can be parsed before torch is imported.

tests/cli/test_startup.py compares them with the modules that define them.
"""

from __future__ import annotations

from typing import Literal, get_args

DTYPES = ("bf16", "fp16", "fp32")
"""Names of dtypes for arguments.dtype_of."""
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCKSIZE = 64
Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
TRAINERS = ("own", "hf")
OUTTYPES = ("f16", "bf16", "f32", "q8_0")
"""Types of matrices in GGUF files."""
TRACKERS = ("tensorboard", "wandb", "trackio")
METHODS = (
    "lora",
    "adalora",
    "ia3",
    "vera",
    "loha",
    "lokr",
    "oft",
    "boft",
    "bitfit",
    "prefix_tuning",
    "prompt_tuning",
    "p_tuning",
    "p_tuning_v2",
    "bottleneck_adapter",
    "mam",
    "unipelt",
)
"""Names of the PEFT methods for `finetune --method`."""
