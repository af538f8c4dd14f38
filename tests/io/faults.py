"""Every save of the package under every fault: python -m tests.io.faults, or `make faults`.

For each save, the folder holds one state, and an action that writes another state is hit by a fault at each of its file
operations in turn. Afterwards a reader must find the complete old or the complete new state, Hugging Face PEFT must not
read a mixture of the two from an adapter folder, the next save must succeed, and no unfinished files may be left.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_kernels import peft
from qlora_kernels.integrations.transformers import load_model, load_tokenizer
from qlora_kernels.io import atomic
from qlora_kernels.io.atomic import COMMIT, folder_appearing_by_rename, settle
from qlora_kernels.io.model_cache import cached_folder
from qlora_kernels.io.peft_checkpoint import CONFIG, WEIGHTS, read_adapters
from qlora_kernels.io.staging import PARTIAL
from qlora_kernels.io.streaming import quantize_folder
from qlora_kernels.io.training_state import load_latest, save_training_state
from tests.io.fault_injection import Fault, every_point, limited
from tests.support.tiny_model import write_tiny_llama

FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""A file system in memory, where fsync takes no time."""


@dataclass(frozen=True)
class Save:
    """write(folder, which) saves state 0 or 1 to a folder; read(folder) returns a comparable value of what is found."""

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], object]


@cache
def _adapters(which: int) -> peft.PeftModel:
    """Return two adapters, the first of which has other files in each state: a combination, and a single one."""
    torch.manual_seed(which)
    lora = peft.LoraConfig(r=2 + which, lora_alpha=8 << which, target_modules=["0"], init_lora_weights=False)
    first = lora if which else [lora, peft.BitFitConfig()]
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), first)
    model.add_adapter("other", lora.replace(target_modules=["1"]))
    return model


def _write_adapters(folder: Path, which: int) -> None:
    _adapters(which).save_pretrained(folder)


def _read_adapters(folder: Path) -> object:
    return [
        (json.dumps(files.config, sort_keys=True), {name: t.tolist() for name, t in files.tensors.items()})
        for place in (folder, folder / "other")
        for files in read_adapters(place)
    ]


def _write_checkpoint(folder: Path, which: int) -> None:
    save_training_state(folder, which, {"x": torch.full((50,), float(which))})


def _read_checkpoint(folder: Path) -> object:
    state = load_latest(folder)
    assert state is not None
    return state.step, state.parts["x"].tolist()


def _fill(folder: Path, which: int) -> None:
    (folder / "config.json").write_text(json.dumps(which))
    (folder / "model.safetensors").write_text(f"weights {which}" * 9)
    (folder / "parts").mkdir()
    (folder / "parts" / f"only_{which}").write_text("")


def _write_folder(folder: Path, which: int) -> None:
    with folder_appearing_by_rename(folder / "model") as partial:
        _fill(partial, which)


def _read_folder(folder: Path) -> object:
    settle(folder / "model")
    return _contents(folder / "model")


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _write_cache(folder: Path, which: int) -> None:
    source = folder / f"source-{which}"
    if not source.exists():
        source.write_text(str(which))
    cached_folder(folder / "cache", "kind", source, {}, lambda partial: _fill(partial, which))


def _read_cache(folder: Path) -> object:
    """Return what a later run gets: the existing entry, or one that it makes."""
    return [
        _contents(cached_folder(folder / "cache", "kind", folder / f"source-{i}", {}, lambda p, i=i: _fill(p, i))[0])
        for i in (0, 1)
        if (folder / f"source-{i}").exists()
    ]


@cache
def _sources() -> Path:
    """Return two dense models, in folders 0 and 1."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for which in (0, 1):
        write_tiny_llama(folder / str(which), hidden=16, seed=which)
    return folder


def _write_quantized(folder: Path, which: int) -> None:
    """Write as `qlora-kernels quantize` does once the model's layers are known."""
    source = _sources() / str(which)
    with folder_appearing_by_rename(folder / "model") as partial:
        quantize_folder(source, partial, ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])


@cache
def _merged(which: int) -> tuple[Any, Any]:
    """Return (merged model, tokenizer), as `qlora-kernels merge` has them before it writes."""
    source = _sources() / str(which)
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(load_model(source), config)
    return model.merge_and_unload(), load_tokenizer(source)


def _write_merged(folder: Path, which: int) -> None:
    with folder_appearing_by_rename(folder / "model") as partial:
        for part in _merged(which):
            part.save_pretrained(partial)


SAVES = [
    Save("adapters", _write_adapters, _read_adapters),
    Save("checkpoint", _write_checkpoint, _read_checkpoint),
    Save("model folder", _write_folder, _read_folder),
    Save("model folder, no exchange", _write_folder, _read_folder),
    Save("cache", _write_cache, _read_cache),
    Save("quantized model", _write_quantized, _read_folder),
    Save("merged model", _write_merged, _read_folder),
]


@contextmanager
def exchange_of(save: Save) -> Iterator[None]:
    """Disable the system's exchange for the save that must work without it."""
    exchange = atomic.exchange
    if "no exchange" in save.name:
        atomic.exchange = lambda first, second: False
    try:
        yield
    finally:
        atomic.exchange = exchange


def inject(save: Save, fault: Fault, *, step: int = 1) -> int:
    """Inject a fault at every `step`-th operation. Returns the number of faults; raises AssertionError for a loss."""

    def runs(write: Callable[[], object], folder: Path) -> Iterator[str]:
        return (f"{fault.value} at operation {n}" for n in every_point(write, fault, step=step))

    return inject_runs(save, runs)


def inject_full_disk(save: Save, sizes: Iterable[int]) -> int:
    """Limit the sizes of files, so that write calls fail. Returns the number of faults."""

    def runs(write: Callable[[], object], folder: Path) -> Iterator[str]:
        return (f"files limited to {size} bytes" for size in itertools.takewhile(lambda n: limited(write, n), sizes))

    return inject_runs(save, runs)


def inject_runs(save: Save, runs: Callable[[Callable[[], object], Path], Iterator[str]]) -> int:
    """Inject one fault after another into a save, and check after each that no checkpoint was lost.

    runs: called with a save function and its folder; runs the save once per fault, yielding a text about the fault.
    Returns the number of faults. Raises AssertionError if a checkpoint was lost.
    """
    with tempfile.TemporaryDirectory(dir=FAST) as scratch, exchange_of(save):
        start, folder = Path(scratch, "start"), Path(scratch, "folder")
        start.mkdir()
        save.write(start, 0)
        old = save.read(start)
        shutil.copytree(start, folder)
        save.write(folder, 1)
        new = save.read(folder)
        assert old != new
        _restore(start, folder)
        injected = 0
        for where in runs(lambda: save.write(folder, 1), folder):
            injected += 1
            _check(save, folder, old, new, f"{save.name}: {where}")
            _restore(start, folder)
        return injected


def _check(save: Save, folder: Path, old: object, new: object, where: str) -> None:
    if save.name == "adapters":
        _check_others_view(folder, old, new, where)
    found = save.read(folder)
    assert found in (old, new), where
    save.write(folder, 1)
    assert save.read(folder) == new, where
    left = [p.name for p in folder.rglob(".*") if p.name.startswith((PARTIAL, COMMIT))]
    assert not left, f"{where}: {left} left after the next save"


def _check_others_view(folder: Path, old: object, new: object, where: str) -> None:
    """Check that a program that opens both adapter files by name never gets one file of each state."""
    from safetensors.torch import load_file

    assert isinstance(old, list)
    assert isinstance(new, list)
    assert all(one != other for one, other in itertools.product(old, new))
    for place in (folder, folder / "0_lora", folder / "other"):
        if (place / CONFIG).is_file() and (place / WEIGHTS).is_file():
            seen = json.dumps(json.loads((place / CONFIG).read_text()), sort_keys=True)
            tensors = {name: tensor.tolist() for name, tensor in load_file(place / WEIGHTS).items()}
            assert (seen, tensors) in [*old, *new], f"{where}: other programs read a mixture"


def _restore(start: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(start, folder)


def main() -> None:
    """Print the table of docs/reliability.md."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    started, total = time.perf_counter(), 0
    print("| save | " + " | ".join(fault.value for fault in Fault) + " | a write fails after n bytes | lost |")
    print("|---" * (len(Fault) + 3) + "|")
    for save in SAVES:
        counts = [inject(save, fault) for fault in Fault]
        counts.append(inject_full_disk(save, iter(range(0, 4096, 16))))
        total += sum(counts)
        print(f"| {save.name} | " + " | ".join(map(str, counts)) + " | 0 |", flush=True)
    print(f"\n{total} faults injected, lost: 0, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
