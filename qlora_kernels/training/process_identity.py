"""Identity of a process, by which the other processes of its machine learn that it has ended."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

_ENDED = ("Z", "X")
"""States in Linux's /proc of a process that has ended: its parent has not yet asked for its exit status, or has."""


def own_identity() -> str:
    """Return the machine, number and start time of this process, as text."""
    return json.dumps([_machine(), os.getpid(), _state_and_start(os.getpid())[1]])


def has_ended(identity: str) -> bool:
    """Whether the process is known to have ended; False for a process of another machine or container.

    identity: what `own_identity` returned in that process.
    """
    machine, number, start = json.loads(identity)
    if machine != _machine() or sys.platform == "win32":  # Windows' os.kill ends the process for every signal
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    state, start_now = _state_and_start(number)
    return state in _ENDED or start_now != start  # another process has got the number


def _machine() -> list[str]:
    """Return the name of the host, its boot and the namespace of process numbers, as far as the system has them."""
    names = [socket.gethostname()]
    with suppress(OSError):
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
    with suppress(OSError):
        names.append(os.readlink("/proc/self/ns/pid"))
    return names


def _state_and_start(number: int) -> tuple[str, str]:
    """Return fields 3 and 22 of /proc/<number>/stat (man proc_pid_stat); empty texts without such a file."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")
