"""Repeated training, saving, loading, resuming and merging with every PEFT method: python -m tests.soak

    SOAK_MINUTES=10 make soak       exit code 1 if values are lost or memory, descriptors, threads or files grow

A cycle runs each case of tests/peft/cases.py: three steps of PagedAdamW with pages in a file, a checkpoint after the
second step, saving and loading of the adapter (same logits), the third step again from the checkpoint (same loss) and,
if the method supports it, a merge. The process is measured after every cycle, and the last cycles are compared with the
first ones after a warm-up. The bytes that safetensors leaves allocated for each tensor that it reads are left out.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from qlora_kernels import PagedAdamW
from qlora_kernels.io import safetensors_reader
from qlora_kernels.io.training_state import load_latest, save_training_state
from qlora_kernels.peft import PeftModel
from tests.peft.cases import CASES, build, task_loss
from tests.peft.models import batch, logits, make

WARM_UP = 2
"""Number of cycles in which caches, allocators and thread pools reach their final size."""
MOST_GROWTH = 6 << 20
"""Permitted growth of anonymous memory over the whole run, in bytes, because the allocator rearranges itself."""

RETAINED_PER_TENSOR = 2 * 32
"""Bytes that safetensors 0.8.0 never frees after get_tensor: the two Python integers of the tensor's byte range."""


@dataclass(frozen=True)
class Usage:
    """The resources of a process."""

    memory: int  # bytes, anonymous and resident
    descriptors: int
    threads: int
    files: int  # in the folder for temporary files


def usage(folder: Path) -> Usage:
    """Return this process's usage after a garbage collection."""
    gc.collect()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    files = sum(len(names) for _, _, names in os.walk(folder))
    return Usage(
        memory=int(lines["RssAnon"].split()[0]) * 1024,
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=int(lines["Threads"]),
        files=files,
    )


@contextmanager
def count_tensors_read() -> Iterator[list[int]]:
    """Count the tensors that this package reads by safetensors. Yields a list of one number."""
    count, opened = [0], safetensors_reader.open_safetensors

    @contextmanager
    def counting(path: str | os.PathLike[str]) -> Iterator[Any]:
        with opened(path) as file:
            count[0] += len(file.keys())
            yield file

    with mock.patch.object(safetensors_reader, "open_safetensors", counting):
        yield count


def take_through(case: str, folder: Path) -> None:
    """Run one case from start to end. Raises AssertionError if a value is lost."""
    nf4 = CASES[case].quantized
    model = build(case, "llama", nf4=nf4).train()
    optimizer = _optimizer(model, folder)
    for number in (1, 2):
        _step(model, optimizer, number)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = {name: parameter for name, parameter in model.named_parameters() if name in names}
    save_training_state(folder / "checkpoints", 2, {"adapter": dict(trained), "optimizer": optimizer})
    third = _step(model, optimizer, 3)
    with torch.no_grad():
        expected = logits(model.eval(), batch("llama"))
    model.save_pretrained(folder / "adapter", ["default"])
    _check_loaded(case, folder, nf4, expected)
    assert _resumed(case, folder, nf4) == third, f"{case}: the resumed step differs"
    try:
        merged = model.merge_and_unload()
    except (NotImplementedError, ValueError, RuntimeError):
        return  # the method cannot be merged
    with torch.no_grad():
        assert logits(merged, batch("llama")).isfinite().all(), case


def _optimizer(model: PeftModel, folder: Path) -> PagedAdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return PagedAdamW(parameters, lr=1e-3, page_dir=folder)


def _step(model: PeftModel, optimizer: PagedAdamW, number: int) -> float:
    torch.manual_seed(number)  # of dropout
    loss = task_loss(model, "llama")
    loss.backward()
    model.step(number)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _resumed(case: str, folder: Path, nf4: bool) -> float:
    state = load_latest(folder / "checkpoints")
    assert state is not None
    model = build(case, "llama", nf4=nf4).train()
    model.load_state_dict(state.parts["adapter"], strict=False)
    optimizer = _optimizer(model, folder)
    state.restore({"optimizer": optimizer})
    return _step(model, optimizer, 3)


def _check_loaded(case: str, folder: Path, nf4: bool, expected: torch.Tensor) -> None:
    loaded = build(case, "llama", nf4=nf4) if case == "fusion" else PeftModel(make("llama", nf4=nf4))
    if case == "fusion":  # the adapters that it combines must be added first
        loaded.delete_adapter("default")
    loaded.load_adapter(folder / "adapter")
    loaded.set_adapter("default", inference_mode=True)
    with torch.no_grad():
        difference = (logits(loaded, batch("llama")) - expected).abs().max().item()
    assert difference <= 1e-5 * max(1.0, expected.abs().max().item()), f"{case}: the loaded adapter differs"


def soak(minutes: float) -> int:
    """Run cycles for that long, at least three. Returns 1 if the process has grown."""
    torch.set_num_threads(2)
    end, cycle, first, read_before = time.monotonic() + minutes * 60, 0, None, 0
    with tempfile.TemporaryDirectory() as scratch, count_tensors_read() as read:
        tempfile.tempdir = scratch
        while cycle < WARM_UP + 1 or time.monotonic() < end:
            for case in CASES:
                with tempfile.TemporaryDirectory() as folder:
                    take_through(case, Path(folder))
            cycle += 1
            last = usage(Path(scratch))
            if cycle == WARM_UP:
                first, read_before = last, read[0]
            print(
                f"cycle {cycle}: {last.memory / 2**20:.1f} MB, {last.descriptors} descriptors, "
                f"{last.threads} threads ({threading.active_count()} of Python), {last.files} temporary files",
                flush=True,
            )
    assert first is not None
    retained = (read[0] - read_before) * RETAINED_PER_TENSOR
    grown = (
        last.memory > first.memory + retained + MOST_GROWTH
        or last.descriptors > first.descriptors
        or last.threads > first.threads
        or last.files > first.files
    )
    print(
        f"{cycle} cycles of {len(CASES)} cases: {'GROWN' if grown else 'nothing has grown'}, lost: 0; "
        f"memory {(last.memory - first.memory) / 2**20:+.1f} MB, of which safetensors retains {retained / 2**20:.1f} MB"
    )
    return int(grown)


def main() -> int:
    """Read the minutes from the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    return soak(options.minutes)


if __name__ == "__main__":
    sys.exit(main())
