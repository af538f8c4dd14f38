"""A pytest plugin: torch's matrix products on the CPU add up their terms in another random order at every call.

    python -m pytest -p tests.support.shuffled_blas tests/peft

Stands for the BLAS of other CPUs, and for one whose order depends on the alignment of tensors: the same call with the
same numbers gives other last bits. A test that fails here asserts something about the order in which another library
adds. Attention runs as its plain composition, so that its products are shuffled as well. Kernels of this project are
not affected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ORDERS = torch.Generator().manual_seed(0)
_LIBRARY = torch.library.Library("aten", "IMPL")


def _shuffled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of a @ b with the contracted dimension permuted."""
    if not a.is_floating_point() or a.shape[-1] == 0:
        return a, b
    order = torch.randperm(a.shape[-1], generator=_ORDERS)
    return a.index_select(-1, order), b.index_select(-2, order)


def _product(name: str) -> Any:
    out_variant = getattr(torch.ops.aten, name).out

    def run(a: Tensor, b: Tensor) -> Tensor:
        out = a.new_empty((*a.shape[:-1], b.shape[-1]))
        return out_variant(*_shuffled(a, b), out=out)  # type: ignore[no-any-return]

    return run


def _added_product(name: str) -> Any:
    out_variant = getattr(torch.ops.aten, name).out

    def run(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        out = a.new_empty((*a.shape[:-1], b.shape[-1]))
        return out_variant(c, *_shuffled(a, b), beta=beta, alpha=alpha, out=out)  # type: ignore[no-any-return]

    return run


def pytest_configure(config: Any) -> None:
    """Replace torch's kernels; their out variants remain torch's own."""
    for name in ("mm", "bmm"):
        _LIBRARY.impl(name, _product(name), "CPU")
    for name in ("addmm", "baddbmm"):
        _LIBRARY.impl(name, _added_product(name), "CPU")
    torch.backends.cuda.enable_flash_sdp(False)  # on the CPU, too, it calls BLAS from C++
    a, b = torch.randn(64, 512), torch.randn(512, 64)
    assert not torch.equal(a @ b, a @ b), "the products are not shuffled"
