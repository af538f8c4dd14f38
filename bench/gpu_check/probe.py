"""Probe step: checks that this Python has a torch with access to a GPU, or gives the reason."""

from __future__ import annotations

import importlib.util
import sys

from .rows import Rows, step_arguments

NO_GPU = 2
"""Exit code of the probe and of the check if nothing can be checked."""


def obstacle() -> str | None:
    """Return why nothing can be checked here, with the fix, or None."""
    try:
        import torch
    except ImportError as error:
        return (
            f"{sys.executable} cannot import torch ({error}); set PYTHON to an interpreter with a CUDA build of torch"
        )
    if importlib.util.find_spec("numpy") is None:
        return f"{sys.executable} has no numpy, which the package needs; set PYTHON to an interpreter that has it"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; set PYTHON to an interpreter with a CUDA build of torch"
        )
    if not torch.cuda.is_available():
        return f"no CUDA device is visible to torch {torch.__version__}; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


def main() -> int:
    """Write the GPU's and the libraries' names as a row, or the reason to stderr; the exit code is NO_GPU then."""
    rows = Rows(step_arguments(__doc__).out, "probe")
    if (reason := obstacle()) is not None:
        rows.add(obstacle=reason)
        return NO_GPU
    import torch

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    rows.add(
        gpu=device.name,
        capability=10 * device.major + device.minor,
        memory_bytes=device.total_memory,
        torch=torch.__version__,
        cuda=torch.version.cuda,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
