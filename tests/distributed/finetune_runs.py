"""Runs of `qlora-kernels finetune` in several processes: python -m tests.distributed.finetune_runs FOLDER.

The runs are one with one process, one with two, and one that loses a process of 4, is resumed with 2, loses one of
them, and is finished by one. Each process writes its output and exit code to FOLDER/<run>.<rank>.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
STEPS = 6


class Run(NamedTuple):
    """dies: (rank, step) of a process that ends there without a message.   out: name of the folder."""

    name: str
    world: int
    out: str
    dies: tuple[int, int] | None = None
    resume: bool = False


RUNS = [
    Run("one", 1, "one"),
    Run("two", 2, "two"),
    Run("four that lose one", 4, "resumed", dies=(3, 2)),
    Run("two that lose one", 2, "resumed", dies=(0, 4), resume=True),
    Run("the last", 1, "resumed", resume=True),
]


def arguments(folder: Path, run: Run) -> list[str]:
    fast = f"--steps {STEPS} --batch 3 --seq-len 32 --eval-windows 5 --lr 1e-2 --r 4 --max-new-tokens 2 --json"
    fast += " --checkpoint-every 2 --timeout 120 --compute-dtype fp32"
    files = ["--model", folder / "model", "--data", folder / "text.txt", "--out", folder / run.out]
    resume = ["--resume"] if run.resume else []
    return ["finetune", *map(str, files), "--cache", str(folder / "cache"), *fast.split(), *resume]


def process(folder: Path, run: Run, rank: int) -> int:
    """Run the command in one of the processes."""
    import torch
    import torch.distributed as dist

    from qlora_kernels.cli import main
    from qlora_kernels.training import loop, workers

    torch.set_num_threads(1)
    workers._GRACE = 5.0
    if run.world > 1:
        store = dist.FileStore(str(folder / f"{run.name}.store"), run.world)
        timeout = timedelta(seconds=120)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=run.world, timeout=timeout)
    step = loop._step

    def dying(*parts):
        if run.dies is not None and run.dies == (rank, parts[5]):
            os._exit(9)
        return step(*parts)

    loop._step = dying
    return main(arguments(folder, run))


def _main(folder: Path) -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401, once for all processes

    from tests.support.tiny_model import write_tiny_llama

    child = os.fork()  # only the child computes, because all other processes are forked from this one
    if child == 0:
        write_tiny_llama(folder / "model")
        (folder / "text.txt").write_text(TEXT)
        os._exit(0)
    os.waitpid(child, 0)
    for run in RUNS:
        children = {}
        for rank in range(run.world):
            child = os.fork()
            if child == 0:
                code = 70
                try:
                    for number, kind in ((1, "out"), (2, "err")):
                        file = os.open(folder / f"{run.name}.{rank}.{kind}", os.O_CREAT | os.O_WRONLY)
                        os.dup2(file, number)
                    code = process(folder, run, rank)
                    sys.stdout.flush()
                    sys.stderr.flush()
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                finally:
                    os._exit(code)
            children[child] = rank
        for child, rank in children.items():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            (folder / f"{run.name}.{rank}.code").write_text(str(code))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
