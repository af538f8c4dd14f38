"""The fence between copies to shared memory and the asynchronous products of sm_90 and sm_100, which old Tritons lack.

The tensor cores of these GPUs read shared memory through the asynchronous proxy, and cp.async writes it through the
generic one. PTX demands a fence.proxy.async between the two. Triton inserts it since FENCED_SINCE
(triton-lang/triton, pull request 10537); without it, results are undefined.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata

ASYNCHRONOUS_PRODUCTS = range(90, 120)
"""Compute capabilities for which Triton's products are wgmma or tcgen05."""

FENCED_SINCE = (3, 7, 1)
"""The first version of Triton that inserts the fence for operands copied by cp.async."""


@cache
def missing_fence(capability: int) -> str | None:
    """Return why the fused kernels are left out on a GPU under the installed Triton, or None."""
    if capability not in ASYNCHRONOUS_PRODUCTS:
        return None
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None
    if tuple(int(number) for number in re.findall(r"\d+", version)[:3]) >= FENCED_SINCE:
        return None
    needed = ".".join(map(str, FENCED_SINCE))
    return (
        f"Triton {version} leaves out the fence between shared memory and the tensor cores of sm_{capability}; "
        f"Triton {needed} or later has it"
    )
