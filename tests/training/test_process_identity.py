"""A process that has ended is known as such to the processes of its machine, and to no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from qlora_kernels.training.process_identity import has_ended, own_identity

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no process is known to have ended on Windows")
CHILD = "from qlora_kernels.training.process_identity import own_identity; print(own_identity(), flush=True); input()"


def test_process_has_ended_once_it_exits_also_before_its_parent_waits_for_it():
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    identity = child.stdout.readline()
    assert not has_ended(identity)
    child.stdin.close()
    if sys.platform == "linux":
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # leaves the child as a zombie
        assert has_ended(identity)
    child.wait()
    child.stdout.close()
    assert has_ended(identity)


def test_running_process_has_not_ended():
    assert not has_ended(own_identity())


@pytest.mark.skipif(sys.platform != "linux", reason="start times are read from /proc")
def test_another_process_with_the_number_of_an_ended_one_is_told_apart():
    machine, number, start = json.loads(own_identity())
    assert has_ended(json.dumps([machine, number, start + "0"]))


def test_nothing_is_known_of_processes_of_other_machines():
    _, number, start = json.loads(own_identity())
    assert not has_ended(json.dumps([["another"], number, start + "0"]))
