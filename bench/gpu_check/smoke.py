"""Smoke step: versions, and each op of one backend once on one tile, compared with the CPU."""

from __future__ import annotations

import sys

import torch

from qlora_kernels.ops.registry import unavailable

from .cases import TINY_SIZES, Sizes
from .compare import check_case, check_codec
from .rows import Rows, step_arguments

CODEC = (torch.bfloat16, 4096 + 96, True)
"""Dtype, elements and double quantization of the codec's call."""

CASE = "lora"


def sizes(tiny: bool) -> Sizes:
    """Return the sizes of the case, or those of a rehearsal."""
    return TINY_SIZES if tiny else Sizes(5, 64, 128)


def main() -> int:
    """Run the step; 1 if the backend cannot be used."""
    arguments = step_arguments(__doc__)
    rows = Rows(arguments.out, "smoke")
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:  # of this backend alone: the other one's library may not load
        state = unavailable(arguments.backend) or "available"
    except Exception as error:
        state = f"{type(error).__name__}: {error}"
    rows.add(
        backend=arguments.backend,
        gpu=device.name,
        capability=10 * device.major + device.minor,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        state=state,
    )
    if state != "available":
        return 1
    ok = check_codec(rows, arguments.backend, *CODEC)
    ok &= check_case(rows, arguments.backend, CASE, torch.bfloat16, sizes(arguments.tiny))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
