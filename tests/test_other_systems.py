"""The package uses only features of the operating system that Linux, macOS and Windows all have.

The other systems are imitated by hiding features that their Pythons lack.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qlora_kernels"

WITHOUT_POSIX = """
import mmap, os, pkgutil, sys, traceback
import torch, numpy, safetensors.torch                # have branches of their own for each system
import torch.distributed.tensor.parallel, torch.distributed.fsdp  # which need typing_extensions themselves
hidden = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "syslog", "typing_extensions")
for name in hidden:
    sys.modules[name] = None                          # an import raises ModuleNotFoundError
for name in ("posix_fallocate", "sched_getaffinity", "fork", "geteuid", "getuid", "sysconf", "uname", "statvfs"):
    delattr(os, name)
for name in [name for name in dir(mmap) if name.startswith(("MADV_", "MAP_", "PROT_"))]:
    delattr(mmap, name)
import qlora_kernels
for module in pkgutil.walk_packages(qlora_kernels.__path__, "qlora_kernels."):
    if ".triton" in module.name or module.name.endswith((".__main__", "._C")):
        continue
    try:
        __import__(module.name)
    except ModuleNotFoundError as error:              # an extra that is not installed, or that needs a hidden module
        frames = traceback.extract_tb(error.__traceback__)
        importer = [frame.filename for frame in frames if not frame.filename.startswith("<frozen")][-1]
        if error.name in hidden and importer.startswith(os.path.dirname(qlora_kernels.__file__)):
            raise
from qlora_kernels.cli import main
sys.exit(main(["info"]))
"""


def test_package_and_command_import_without_posix_modules():
    command = [sys.executable, "-c", WITHOUT_POSIX]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "instruction sets" in done.stdout


def test_peak_memory_without_resource(monkeypatch):
    """On Windows, psutil reports it."""
    psutil = pytest.importorskip("psutil")
    from qlora_kernels.cli import console

    class Process:
        def memory_info(self):
            return type("Info", (), {"peak_wset": 123})

    assert console.peak_rss_bytes() > 1 << 20
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil, "Process", Process)
    assert console.peak_rss_bytes() == 123
