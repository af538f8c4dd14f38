"""The torch device and the compute dtype of --device and --compute-dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .arguments import UsageError
from .choices import DTYPES
from .container_memory import memory_limits


def chosen_device(name: str, environment: Mapping[str, str]) -> torch.device:
    """Return the device that --device names on this machine.

    name: auto (the CUDA device if torch finds one, else the CPU), cpu, cuda or cuda:N.
    environment: variables of the process; under torchrun and accelerate launch, LOCAL_RANK is the number of the device
    for auto and cuda.
    Raises UsageError for a device that torch does not find.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if not count:
        why = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise UsageError(f"--device: must be a device of this machine, got {name}, but {why}; use cpu or auto")
    _, colon, number = name.partition(":")
    index = int(number) if colon else int(environment.get("LOCAL_RANK", "0"))
    if index >= count:
        rule = "--device: must be one of" if colon else "--device: LOCAL_RANK must number one of"
        raise UsageError(f"{rule} the {count} CUDA devices that torch sees, got {index}; numbers start at 0")
    return torch.device("cuda", index)


def chosen_dtype(name: str, device: torch.device) -> str:
    """Return the name in DTYPES of --compute-dtype on `device`.

    auto is bf16, but fp16 on CUDA devices that emulate bf16 (before compute capability 8.0).
    """
    if name in DTYPES:
        return name
    if device.type != "cuda":
        return "bf16"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def memory_bytes(device: torch.device) -> int:
    """Return the memory of a device in bytes; for the CPU, RAM, or what a container may use of it, plus swap."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    memory = min([psutil.virtual_memory().total, *(group.limit for group in memory_limits())])
    return int(memory + psutil.swap_memory().total)
