"""Processes that save and read the same place and are killed at random moments: python -m tests.io.stress

    python -m tests.io.stress --seconds 60        for each place and each kind of file system; exit code 1 for a loss

Every save writes one text to all of its files. A reader must always find the complete files of one save, no process may
fail, and after one more save no unfinished files may be left.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_kernels.io import atomic, locks
from qlora_kernels.io.atomic import (
    COMMIT,
    file_appearing_by_rename,
    files_appearing_together,
    folder_appearing_by_rename,
    reading,
)
from qlora_kernels.io.model_cache import cached_folder
from qlora_kernels.io.staging import PARTIAL

WRITERS, READERS = 3, 2
PLACES = ("files", "folder", "folder and files", "file", "cache")
SYSTEMS = ("as it is", "no exchange", "no flock", "no exchange, no flock")
NAMES = ("config", "parts/weights", "note")
"""The last one is not part of every save."""


def stress(place: str, seconds: float, system: str = "as it is", *, seed: int = 0) -> int:
    """Run and kill processes for `seconds`, at least one. Returns how many; raises AssertionError for a loss."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as scratch:
        target = Path(scratch, "target")
        Path(scratch, "source").write_text("source", encoding="utf-8")
        with _file_system(system, scratch):
            roles: dict[int, bool] = {}  # process -> whether it writes
            killed, end = 0, time.monotonic() + seconds
            while killed == 0 or time.monotonic() < end:
                while len(roles) < WRITERS + READERS:
                    writes = sum(roles.values()) < WRITERS
                    roles[_in_child((lambda: _write(target, place)) if writes else (lambda: _read(target, place)))] = (
                        writes
                    )
                time.sleep(rng.random() * 0.03)
                chosen = rng.choice(list(roles))
                os.kill(chosen, signal.SIGKILL)
                killed += 1
                if os.WIFEXITED(os.waitpid(chosen, 0)[1]):
                    _kill_all(roles.keys() - {chosen})
                    raise AssertionError(f"{place}, {system}: a process failed, see the traceback above")
                del roles[chosen]
            failed = _kill_all(roles.keys())
            assert not failed, f"{place}, {system}: {failed} processes failed, see the tracebacks above"
            _check_end(target, place, locks_work="no flock" not in system)
    return killed


def _write(target: Path, place: str) -> None:
    for number in itertools.count():
        _save(target, place, f"{os.getpid()} {number}", random.randrange(4))


def _save(target: Path, place: str, text: str, variant: int) -> None:
    names = NAMES[: 3 - variant % 2]
    if place == "file":
        with file_appearing_by_rename(target / "file") as partial:
            partial.write_text(text * 1000)
    elif place == "cache":
        cached_folder(target, "kind", target.parent / "source", {}, lambda partial: _fill(partial, "made", NAMES))
        if variant == 0:  # damaged, so that it is made again
            for path in target.glob("kind-*/config"):
                path.unlink(missing_ok=True)
    elif place == "files" or (place == "folder and files" and variant > 1):
        replaced = suppress(*([OSError] if place != "files" else []))  # the folder, by another process meanwhile
        with replaced, files_appearing_together(target, NAMES) as partial:
            _fill(partial, text, names)
    else:
        with folder_appearing_by_rename(target) as partial:
            _fill(partial, text, names)


def _fill(partial: Path, text: str, names: tuple[str, ...]) -> None:
    for name in names:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text(text)


def _read(target: Path, place: str) -> None:
    while True:
        if place == "file":
            with suppress(FileNotFoundError):
                text = (target / "file").read_text()
                assert text == text[: len(text) // 1000] * 1000, "torn"
        elif place != "cache":
            _read_once(target)
        time.sleep(0.001)


def _read_once(target: Path) -> None:
    found: dict[str, str] = {}
    if not target.is_dir():  # a missing folder is not locked
        return
    with reading(target):
        for name in NAMES:
            with suppress(FileNotFoundError):
                found[name] = (target / name).read_text()
            time.sleep(random.random() * 0.001)
    assert len(set(found.values())) <= 1, f"a mixture of saves: {found}"
    assert not found or {*NAMES[:2]} <= found.keys(), f"a part of a save: {found}"


def _check_end(target: Path, place: str, *, locks_work: bool) -> None:
    """Check that one more save succeeds, that a reader finds it, and that no unfinished files are left."""
    _save(target, place, "last", 1)
    if place in ("files", "folder", "folder and files"):
        with reading(target):
            assert [(target / name).read_text() for name in NAMES[:2]] == ["last", "last"]
            assert not (target / NAMES[2]).exists()
    unfinished = (COMMIT, PARTIAL, ".lock-") if locks_work else (COMMIT,)  # the others are removed after a day there
    left = [
        str(path.relative_to(target.parent)) for path in target.parent.rglob(".*") if path.name.startswith(unfinished)
    ]
    assert not left, f"left after the last save: {left}"


@contextmanager
def _file_system(system: str, scratch: str) -> Iterator[None]:
    """Imitate, in this process and its children, a file system without the features named by `system`."""
    exchange, fcntl, fsync = atomic.exchange, locks.fcntl, os.fsync
    os.fsync = lambda descriptor: None  # not needed, because power failures are not simulated
    if "no exchange" in system:
        atomic.exchange = lambda first, second: False
    if "no flock" in system:
        locks.fcntl = NoFlockBelow(fcntl, scratch)
    try:
        yield
    finally:
        atomic.exchange, locks.fcntl, os.fsync = exchange, fcntl, fsync


class NoFlockBelow:
    """Stand-in for the module fcntl whose flock fails for files below a given folder.

    shared: shared locks are given nevertheless, as on NFS, where a folder's descriptor cannot be locked exclusively.
    """

    def __init__(self, fcntl: Any, folder: str, *, shared: bool = False) -> None:
        self._fcntl, self._folder, self._shared = fcntl, os.path.realpath(folder), shared

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fcntl, name)

    def flock(self, descriptor: int, operation: int) -> None:
        given = self._shared and operation & self._fcntl.LOCK_SH
        if not given and os.readlink(f"/proc/self/fd/{descriptor}").startswith(self._folder):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._fcntl.flock(descriptor, operation)


def _in_child(action: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        random.seed(os.getpid())
        try:
            action()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return child


def _kill_all(processes: set[int]) -> int:
    """Kill all processes and wait for them. Returns how many had already ended."""
    for process in processes:
        os.kill(process, signal.SIGKILL)
    return sum(os.WIFEXITED(os.waitpid(process, 0)[1]) for process in processes)


def main() -> int:
    """Print a table of docs/reliability.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each place and kind of file system")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| processes killed while they use one | " + " | ".join(SYSTEMS) + " | lost |")
    print("|---" * (len(SYSTEMS) + 2) + "|")
    for place in PLACES:
        counts = [stress(place, options.seconds, system, seed=options.seed) for system in SYSTEMS]
        print(f"| {place} | " + " | ".join(map(str, counts)) + " | 0 |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
