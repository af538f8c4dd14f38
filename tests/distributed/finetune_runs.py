"""Runs of `qlora-kernels finetune` in several processes: python -m tests.distributed.finetune_runs FOLDER.

RUNS lists them: with whole models and sharded ones, with a process that dies, hangs or gets a signal, and their
resumption with fewer processes. Each process writes its output and exit code to FOLDER/<run>.<rank>.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
STEPS = 6


class Run(NamedTuple):
    """dies, hangs, signalled: (rank, step) of a process that ends without a message, sleeps, or gets SIGTERM there.

    out: name of the folder.   more: further options.   environment: of all processes.
    """

    name: str
    world: int
    out: str
    more: str = ""
    dies: tuple[int, int] | None = None
    hangs: tuple[int, int] | None = None
    signalled: tuple[int, int] | None = None
    environment: dict[str, str] = {}  # noqa: RUF012, a NamedTuple's default is never changed


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
"""Some of what `accelerate launch` sets for an FSDP2 configuration."""
RUNS = [
    Run("one", 1, "one"),
    Run("two", 2, "two"),
    Run("four that lose one", 4, "resumed", dies=(3, 2)),
    Run("two that lose one", 2, "resumed", "--resume", dies=(0, 4)),
    Run("the last", 1, "resumed", "--resume"),
    Run("two sharded", 2, "sharded", "--fsdp --micro-batch 1"),
    Run("three sharded by accelerate", 3, "accelerate", "--eval-every 3 --gradient-checkpointing", environment=FSDP2),
    Run("four sharded with a signal", 4, "sharded resumed", "--fsdp", signalled=(1, 1)),
    Run("two sharded with one that hangs", 2, "sharded resumed", "--fsdp --resume", hangs=(1, 4)),
    Run("two sharded that lose one", 2, "sharded resumed", "--fsdp --resume", dies=(0, 5)),
    Run("the last of the sharded", 1, "sharded resumed", "--fsdp --resume"),
    Run("two by Trainer", 2, "trainer", "--trainer hf --checkpoint-every 0"),
    Run("two sharded by Trainer", 2, "sharded trainer", "--trainer hf --checkpoint-every 0", environment=FSDP2),
]
HUNG_TIMEOUT = timedelta(seconds=1)
"""Timeout of the collectives of processes that wait for a hung one, set once it hangs: only the timeout ends them."""
PATIENCE = 120
"""Seconds for everything else that the processes wait for; they pass only where something is wrong."""


def arguments(folder: Path, run: Run) -> list[str]:
    fast = f"--steps {STEPS} --batch 3 --seq-len 32 --eval-windows 5 --lr 1e-2 --r 4 --max-new-tokens 2 --json"
    fast += f" --checkpoint-every 2 --timeout {PATIENCE} --compute-dtype fp32"
    files = ["--model", folder / "model", "--data", folder / "text.txt", "--out", folder / run.out]
    return ["finetune", *map(str, files), "--cache", str(folder / "cache"), *fast.split(), *run.more.split()]


def process(folder: Path, run: Run, rank: int) -> int:
    """Run the command in one of the processes."""
    import torch
    import torch.distributed as dist

    from qlora_kernels.cli import main
    from qlora_kernels.training import loop, workers

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run.world), **run.environment}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # not used: the group exists
    torch.set_num_threads(1)
    workers._GRACE = float(PATIENCE)
    if run.world > 1:
        store = dist.FileStore(str(folder / f"{run.name}.store"), run.world)
        timeout = timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=run.world, timeout=timeout)
    step = loop._step

    def disturbed(*parts):
        here = rank, parts[5]
        if here == run.dies:
            os._exit(9)
        if here == run.hangs:
            store.set("hangs", "1")
            time.sleep(3600)
        if run.hangs is not None and here[1] == run.hangs[1]:
            store.wait(["hangs"])
            dist.distributed_c10d._set_pg_timeout(HUNG_TIMEOUT, dist.group.WORLD)
        if here == run.signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*parts)

    loop._step = disturbed
    return main(arguments(folder, run))


def _main(folder: Path) -> None:
    # Once for all processes. Without a cache of fonts, matplotlib searches for them, and writes to stderr after 5 s.
    import matplotlib.font_manager  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

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
        for child, rank in sorted(children.items(), key=lambda item: _order(run, item[1])):
            if run.hangs is not None and rank == run.hangs[0]:
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            (folder / f"{run.name}.{rank}.code").write_text(str(code))
            if run.dies is not None and rank == run.dies[0]:  # as torchrun does
                for other in children.keys() - {child}:
                    os.kill(other, signal.SIGTERM)


def _order(run: Run, rank: int) -> int:
    """Return the order in which processes are waited for: one that dies first, one that hangs last."""
    return (run.hangs is not None and rank == run.hangs[0]) - (run.dies is not None and rank == run.dies[0])


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
