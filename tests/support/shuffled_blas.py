"""A pytest plugin with which torch's matrix products on the CPU add their terms in a random order.

    python -m pytest -p tests.support.shuffled_blas tests/peft
    SHUFFLED_BLAS=alignment python -m pytest -p tests.support.shuffled_blas tests/training

Without SHUFFLED_BLAS each call has another order, which represents the BLAS of other CPUs: equal calls give different
last bits. A test that fails then depends on the order of another library's additions. With SHUFFLED_BLAS=alignment the
order is a function of the alignment of both operands within a cache line, as in MKL on Intel's CPUs: a run that is
repeated or resumed in equally aligned memory, as torch's allocator provides, has the same bits. Processes that a test
starts are not affected.

Attention runs as its plain composition, so that its products are shuffled too. Kernels of this project are not
affected.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

_BY_ALIGNMENT = os.environ.get("SHUFFLED_BLAS") == "alignment"
_CACHE_LINE = 64
_ORDERS = torch.Generator().manual_seed(0)
_LIBRARY = torch.library.Library("aten", "IMPL")


def _shuffled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The operands of a @ b with the contracted dimension permuted."""
    if not a.is_floating_point() or a.shape[-1] == 0:
        return a, b
    if _BY_ALIGNMENT:
        _ORDERS.manual_seed(a.data_ptr() % _CACHE_LINE * _CACHE_LINE + b.data_ptr() % _CACHE_LINE)
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
    """Replace torch's kernels, except their out variants."""
    for name in ("mm", "bmm"):
        _LIBRARY.impl(name, _product(name), "CPU")
    for name in ("addmm", "baddbmm"):
        _LIBRARY.impl(name, _added_product(name), "CPU")
    torch.backends.cuda.enable_flash_sdp(False)  # also on the CPU, where it calls BLAS from C++
    values, memory = torch.randn(64, 512), torch.empty(64 * 512 + 1)
    elsewhere = memory[1:].view(64, 512).copy_(values)
    repeated = [torch.equal(values @ values.T, other @ other.T) for other in (values, elsewhere)]
    assert repeated == [_BY_ALIGNMENT, False], "the products are not shuffled as they should be"
