"""The cpu backend's kernels."""

from __future__ import annotations

from ...ops._registry import KernelSpec

KERNELS: tuple[KernelSpec, ...] = ()


def unavailable() -> str | None:
    """Why this backend cannot run here, with the fix; None where it can."""
    return "not built; see `make setup`"
