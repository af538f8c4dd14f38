"""Atomic publication: what is replaced, what is kept, cleanup, and protection against hostile folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from qlora_kernels.io import atomic, locks
from qlora_kernels.io.atomic import (
    COMMIT,
    file_appearing_by_rename,
    files_appearing_together,
    folder_appearing_by_rename,
    reading,
    settle,
)
from qlora_kernels.io.exchange import exchange
from qlora_kernels.io.locks import folder_lock, name_lock
from qlora_kernels.io.model_cache import MANIFEST, cached_folder
from qlora_kernels.io.staging import PARTIAL, staging
from tests.io.stress import SYSTEMS, NoFlockBelow, stress

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def in_child(action) -> int:
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def in_child_until_told(action) -> int:
    """Run action(tell) in a child, and return once it has called tell()."""
    read_end, write_end = os.pipe()
    child = in_child(lambda: action(lambda: os.write(write_end, b"x")))
    os.close(write_end)
    with open(read_end, "rb", buffering=0) as told:
        assert told.read(1) == b"x", "the child ended too early"
    return child


@pytest.mark.parametrize("possible", [True, False], ids=["exchange", "no-exchange"])
def test_a_folder_replaces_another_as_a_whole(tmp_path, monkeypatch, possible):
    if not possible:
        monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    folder = tmp_path / "folder"
    for content in ({"a": "1", "sub/b": "2"}, {"a": "3"}, {"sub": "4", "c/d/e": "5"}, {"c": "6"}):
        with folder_appearing_by_rename(folder) as partial:
            for name, text in content.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_text(text)
        assert contents(folder) == content
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(FileExistsError, match="must not exist"), folder_appearing_by_rename(folder, replace=False):
        pass
    (tmp_path / "link").symlink_to(folder)
    with folder_appearing_by_rename(tmp_path / "link") as partial:
        (partial / "x").write_text("7")
    assert contents(folder) == {"x": "7"}
    assert (tmp_path / "link").is_symlink()


def test_files_appear_together_in_folder_with_others(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("config", "old", "sub/old", "mine"):
        (tmp_path / name).write_text("old")
    with files_appearing_together(tmp_path, ["config", "old", "sub/old", "never"]) as partial:
        (partial / "config").write_text("new")
        assert contents(tmp_path)["config"] == "old"
    assert contents(tmp_path) == {"config": "new", "mine": "old"}
    assert not (tmp_path / "sub").exists()  # it has no files left
    with pytest.raises(TypeError), files_appearing_together(tmp_path, ["config"]) as partial:
        (partial / "config").write_text(3)
    assert contents(tmp_path) == {"config": "new", "mine": "old"}


def test_targets_of_wrong_kind_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="must be a folder"), folder_appearing_by_rename(path):
            pass
        with pytest.raises(NotADirectoryError, match="must be a folder"), files_appearing_together(path, []):
            pass
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "mine").touch()
    (tmp_path / "source" / "file").mkdir(parents=True)
    (tmp_path / "source" / "file" / "below").touch()
    for name, message in (("file", "file must be a folder, it is a file"), ("name", "must be a file, it is a folder")):
        with pytest.raises(OSError, match=message), files_appearing_together(tmp_path, ["name"]) as partial:
            os.rename(tmp_path / "source" / name, partial / name) if name == "file" else (partial / name).touch()
    shutil.rmtree(tmp_path / "source")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "name"}


def test_staging_folders_removed_only_after_process_death(tmp_path):
    def die():
        with staging(tmp_path, "dead"):
            os.kill(os.getpid(), signal.SIGKILL)

    with staging(tmp_path, "living") as living:
        os.waitpid(in_child(die), 0)
        (tmp_path / f"{PARTIAL}1234.file").touch()  # as other versions left them; too young to be removed
        assert len(list(tmp_path.glob(f"{PARTIAL}*"))) == 3
        with file_appearing_by_rename(tmp_path / "file") as partial:
            partial.touch()
        assert {path.name for path in tmp_path.iterdir()} == {living.name, f"{PARTIAL}1234.file", "file"}
        os.utime(tmp_path / f"{PARTIAL}1234.file", (0, 0))
        with file_appearing_by_rename(tmp_path / "file") as partial:
            partial.touch()
        assert {path.name for path in tmp_path.iterdir()} == {living.name, "file"}


def unfinished_commit(folder: Path, removed: object, **files: str) -> Path:
    commit = folder / f"{COMMIT}1234"
    (commit / "files").mkdir(parents=True)
    (commit / "removed.json").write_text(json.dumps(removed))
    for name, text in files.items():
        (commit / "files" / name).write_text(text)
    return commit


def test_reader_completes_unfinished_commit(tmp_path):
    (tmp_path / "config").write_text("old")
    (tmp_path / "gone").write_text("old")
    unfinished_commit(tmp_path, {"names": ["gone"]}, config="new", weights="new")
    with reading(tmp_path):
        assert contents(tmp_path) == {"config": "new", "weights": "new"}
    assert not list(tmp_path.glob(f"{COMMIT}*"))
    with reading(tmp_path / "absent"):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_unfinished_commit_in_read_only_folder_raises(tmp_path):
    unfinished_commit(tmp_path, {"names": []}, config="new")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError, match=r"interrupted and must be completed .* make the folder writable"):
            settle(tmp_path)
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("removed", [{"names": ["../mine"]}, {"names": ["out/mine"]}, [1], {"names": 3}, "absolute"])
def test_commit_outside_folder_is_refused(tmp_path, removed):
    mine, folder = tmp_path / "mine", tmp_path / "folder"
    mine.write_text("mine")
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    unfinished_commit(folder, {"names": [str(mine)]} if removed == "absolute" else removed)
    with pytest.raises(ValueError, match=r"must not write outside|must be a list|must hold a JSON object"):
        settle(folder)
    assert mine.read_text() == "mine"


def test_a_linked_commit_is_refused(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    (elsewhere / "files").mkdir(parents=True)
    (elsewhere / "files" / "mine").write_text("mine")
    (folder / f"{COMMIT}1").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="must not be, or hold, a link"):
        settle(folder)
    assert contents(elsewhere) == {"files/mine": "mine"}


def test_exchange(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("not on this system")
    assert contents(tmp_path) == {"a/file": "b", "b/file": "a"}
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


def test_lock_waits_and_is_released_when_holder_dies(tmp_path):
    pytest.importorskip("fcntl")
    order = tmp_path / "order"
    order.touch()
    folder = tmp_path / "folder"
    folder.mkdir()

    def hold(tell):
        with folder_lock(folder), name_lock(tmp_path / "lock"):
            tell()
            time.sleep(0.2)
            order.write_text("held")
            os.kill(os.getpid(), signal.SIGKILL)

    child = in_child_until_told(hold)
    with folder_lock(folder, shared=True), name_lock(tmp_path / "lock"):
        assert order.read_text() == "held"
    os.waitpid(child, 0)
    assert not (tmp_path / "lock").exists()


def test_three_processes_fill_one_cache(tmp_path):
    """One process makes the folder, and the others wait for it; none fails."""
    source = tmp_path / "source"
    source.write_text("s")
    made = tmp_path / "made"

    def make(partial):
        with open(made, "a", encoding="utf-8") as file:
            file.write("x")
        time.sleep(0.05)
        (partial / "weights").write_text("w" * 1000)

    children = [in_child(lambda: cached_folder(tmp_path / "cache", "kind", source, {}, make)) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert made.read_text() == "x"
    [folder] = (tmp_path / "cache").iterdir()
    assert contents(folder)["weights"] == "w" * 1000


@pytest.mark.parametrize("system", SYSTEMS)
def test_concurrent_saves_and_reads_with_killed_processes(system):
    """A short form of tests/io/stress.py."""
    for place in ("files", "folder and files"):
        assert stress(place, 0.4, system)


def test_folder_not_replaced_during_read(tmp_path):
    folder = tmp_path / "folder"

    def replace(tell):
        with folder_appearing_by_rename(folder) as partial:
            (partial / "config").write_text("new")
            tell()

    folder.mkdir()
    (folder / "config").write_text("old")
    with reading(folder):
        child = in_child_until_told(replace)
        time.sleep(0.1)
        assert contents(folder) == {"config": "old"}
    assert os.waitpid(child, 0)[1] == 0
    with reading(folder):
        assert contents(folder) == {"config": "new"}


@pytest.mark.parametrize("replace", [True, False])
def test_folder_made_first_by_another_process(tmp_path, monkeypatch, replace):
    folder, rename = tmp_path / "folder", os.rename

    def rename_late(source, target):
        monkeypatch.setattr(os, "rename", rename)
        folder.mkdir()
        (folder / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_late)
    refused = nullcontext() if replace else pytest.raises(FileExistsError, match="another process has made it")
    with refused, folder_appearing_by_rename(folder, replace=replace) as partial:
        (partial / "ours").touch()
    assert contents(folder) == {"ours" if replace else "theirs": ""}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_older_commit_not_completed_after_newer_one(tmp_path, monkeypatch):
    """A writer is killed after its commit, while another one waits for its lock."""

    @contextmanager
    def lock_after_the_other(folder):
        monkeypatch.setattr(atomic, "folder_lock", folder_lock)
        unfinished_commit(folder, {"names": []}, config="theirs", other="theirs")
        with folder_lock(folder):
            yield

    with files_appearing_together(tmp_path, ["config"]) as partial:
        (partial / "config").write_text("ours")
        monkeypatch.setattr(atomic, "folder_lock", lock_after_the_other)
    settle(tmp_path)
    assert contents(tmp_path) == {"config": "ours", "other": "theirs"}


def test_save_into_replaced_folder_raises(tmp_path):
    """Files written before are lost with the folder, so the save must not publish the rest."""
    folder = tmp_path / "folder"

    def save():
        with files_appearing_together(folder, ["a", "b"]) as partial:
            (partial / "a").touch()
            with folder_appearing_by_rename(folder) as other:
                (other / "theirs").touch()
            partial.mkdir(parents=True)
            (partial / "b").touch()

    with pytest.raises(FileNotFoundError, match="another process has replaced or removed it; save again"):
        save()
    assert contents(folder) == {"theirs": ""}


@pytest.mark.parametrize("nfs", [False, True])
def test_locks_on_a_file_system_without_flock(tmp_path, monkeypatch, nfs):
    """Processes of the machine lock a file in the temporary folder instead, which is removed afterwards."""
    pytest.importorskip("fcntl")
    (tmp_path / "system").mkdir()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    monkeypatch.setattr(locks, "fcntl", NoFlockBelow(locks.fcntl, str(tmp_path / "folder"), shared=nfs))

    def hold(tell):
        with folder_lock(tmp_path / "folder"), name_lock(tmp_path / "folder" / "lock"):
            tell()
            time.sleep(0.2)
            (tmp_path / "released").touch()

    child = in_child_until_told(hold)
    with folder_lock(tmp_path / "folder", shared=True), name_lock(tmp_path / "folder" / "lock"):
        assert (tmp_path / "released").exists()
    assert os.waitpid(child, 0)[1] == 0
    assert contents(tmp_path / "system") == contents(tmp_path / "folder") == {}


@pytest.mark.parametrize("damage", ["missing file", "other size", "no manifest", "broken manifest"])
def test_incomplete_cache_folder_is_rebuilt(tmp_path, damage):
    source = tmp_path / "source"
    source.write_text("s")

    def get():
        return cached_folder(tmp_path / "cache", "kind", source, {}, lambda partial: (partial / "w").write_text("w"))

    folder, _ = get()
    (folder / "note").write_text("mine")
    assert get() == (folder, True)
    if damage == "missing file":
        (folder / "w").unlink()
    elif damage == "other size":
        (folder / "w").write_text("")
    elif damage == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text("[")
    assert get() == (folder, False)
    assert (folder / "w").read_text() == "w"
    assert get() == (folder, True)


def test_import_and_saves_work_without_fcntl(tmp_path):
    """Without fcntl, as on Windows, everything works, and nothing waits."""
    script = """
import sys
sys.modules["fcntl"] = None
from pathlib import Path
from qlora_kernels.io import atomic, locks, model_cache
assert locks.fcntl is None
atomic.exchange = lambda first, second: False
folder = Path(sys.argv[1])
for text in "ab":
    with atomic.folder_appearing_by_rename(folder / "model") as partial:
        (partial / "file").write_text(text)
    with atomic.files_appearing_together(folder, ["x"]) as partial:
        (partial / "x").write_text(text)
    with atomic.reading(folder):
        assert (folder / "x").read_text() == (folder / "model" / "file").read_text() == text
    model_cache.cached_folder(folder, "kind", folder / "x", {}, lambda partial: (partial / "w").write_text("w"))
assert not [path for path in folder.iterdir() if path.name.startswith(".")]
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
