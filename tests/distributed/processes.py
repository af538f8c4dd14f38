"""Runs checks in several processes: `run(modules, worlds, folder)`.

One parent imports everything once and forks the processes of each world in turn, so that starting them is fast. Each
module of checks has a dictionary CHECKS, name -> function(Group). Processes find each other through a file and report
after each check. After a failed check, the rest of that world is not run, because its group may be out of step.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

TIMEOUT = timedelta(seconds=240)
WORLDS = [4, 2, 3]
"""Numbers of processes under FSDP2; the largest comes first, because it writes checkpoints that the others read."""
NOT_RUN = "not run, because an earlier check of this world failed"


@dataclass(frozen=True)
class Group:
    """The argument of a check.   folder: one for all processes of the world."""

    rank: int
    world: int
    folder: Path


def run(modules: Sequence[str], worlds: list[int], folder: Path) -> dict[str, str]:
    """Return "<check> with <world> processes" -> the error in some process, or "" if there was none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.distributed.processes", ",".join(modules), str(folder)]
    command += map(str, worlds)
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    results = {}
    for world in worlds:
        for name in names(*modules):
            reports = [folder / str(world) / f"{name}.{rank}.json" for rank in range(world)]
            texts = [json.loads(path.read_text()) if path.is_file() else NOT_RUN for path in reports]
            wrong = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
            results[f"{name} with {world} processes"] = "\n".join([*wrong, done.stderr[-3000:]]) if wrong else ""
    return results


def names(*modules: str) -> list[str]:
    """Return the names of the modules' checks."""
    return list(_checks(modules))


def _checks(modules: Sequence[str]) -> dict[str, Callable[[Group], None]]:
    return {name: check for module in modules for name, check in importlib.import_module(module).CHECKS.items()}


def _process(modules: Sequence[str], group: Group) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(group.folder / "store"), group.world)
    store.set_timeout(TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.world, timeout=TIMEOUT)
    for name, check in _checks(modules).items():
        error = ""
        try:
            check(group)
        except Exception:
            error = traceback.format_exc()
        (group.folder / f"{name}.{group.rank}.json").write_text(json.dumps(error))
        store.set(f"done/{name}/{group.rank}", "failed" if error else "right")
        if any(store.get(f"done/{name}/{rank}") != b"right" for rank in range(group.world)):
            os._exit(1)
    os._exit(0)  # the group is not destroyed, which would need all processes again


def _main(modules: Sequence[str], folder: Path, worlds: list[int]) -> None:
    _checks(modules)
    for world in worlds:
        here = folder / str(world)
        here.mkdir(parents=True)
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                try:
                    _process(modules, Group(rank, world, here))
                finally:
                    traceback.print_exc()
                    os._exit(2)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    _main(sys.argv[1].split(","), Path(sys.argv[2]), [int(world) for world in sys.argv[3:]])
