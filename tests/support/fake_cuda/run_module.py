"""Runs a module on the fake device.

    FAKE_CUDA_PYTHON=.venv-cuda/bin/python tests/support/fake_cuda/python -m MODULE ARGUMENTS

The module is found as `python -m` would find it in the current folder. FAKE_CUDA_CAPABILITY is the device's compute
capability, 8.0 if it is not set.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Start the device, then run the module that the first argument names."""
    module, *arguments = sys.argv[1:]
    here = Path(__file__).resolve()
    # The module's folder first; the checkout last, for this package alone. Not this folder, which Python put first.
    sys.path[:] = [os.getcwd(), *(path for path in sys.path[1:] if path), str(here.parents[3])]
    from tests.support import fake_cuda

    fake_cuda.activate(capability=os.environ.get("FAKE_CUDA_CAPABILITY", "8.0"))
    from tests.support.fake_cuda import host_ops

    host_ops.install()
    sys.executable = str(here.with_name("python"))  # what the module starts by it runs on the fake device too
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
