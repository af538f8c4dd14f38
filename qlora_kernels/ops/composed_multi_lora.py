"""The low-rank part of a batch whose rows use different adapters, in plain torch, grouped by adapter.

`compose_multi_lora` makes the kernels of linear_nf4_multi_lora from a backend's plain linear. Rows are gathered by
adapter, so that the work is proportional to the number of rows and not to rows times adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .operands import MultiLoRA, Needs, Weight
from .philox import dropped


def rows_by_adapter(adapter: Tensor, n_adapters: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (adapter, its row numbers) for each adapter that has rows. adapter: int64 [M], -1 means none.

    Raises IndexError for a number that is not below n_adapters.
    """
    if adapter.numel():
        lowest, highest = (int(end) for end in adapter.aminmax())
        if lowest < -1 or highest >= n_adapters:
            got = highest if highest >= n_adapters else lowest
            raise IndexError(f"linear_nf4_multi_lora: adapter must lie in [-1, {n_adapters}), got {got}")
    order = adapter.argsort(stable=True)
    counts = torch.bincount(adapter + 1, minlength=n_adapters + 1).tolist()
    for index, rows in enumerate(torch.split(order, counts)):
        if index > 0 and rows.numel():
            yield index - 1, rows


def add_forward(y: Tensor, x: Tensor, lora: MultiLoRA) -> Tensor:
    """Compute y[m] += scalings[e] * (dropout(x[m]) A_e^T) B_e^T for e = adapter[m] in place, and return s [M, r]."""
    s = x.new_zeros(x.shape[0], lora.r)
    x = dropped(x, lora.seed, lora.dropout_p)
    for e, rows in rows_by_adapter(lora.adapter, lora.A.shape[0]):
        part = x[rows] @ lora.A[e].to(x.dtype).T
        s[rows] = part
        y[rows] += (lora.scalings[e] * (part @ lora.B[e].to(x.dtype).T)).to(y.dtype)
    return s


def compose_multi_lora(
    linear_nf4: Callable[[Tensor, Weight, Tensor | None], Tensor], linear_nf4_grad_x: Callable[[Tensor, Weight], Tensor]
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Return linear_nf4_multi_lora and its backward op, composed of one backend's plain linear and its gradient."""

    def linear_nf4_multi_lora(x: Tensor, weight: Weight, bias: Tensor | None, lora: MultiLoRA) -> tuple[Tensor, Tensor]:
        """Return (y, s)."""
        y = linear_nf4(x, weight, bias)
        return y, add_forward(y, x, lora)

    def linear_nf4_multi_lora_backward(
        grad_y: Tensor,
        x: Tensor,
        s: Tensor,
        weight: Weight,
        lora: MultiLoRA,
        needs: Needs,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (grad_x, grad_A, grad_B), empty where not needed."""
        grad_x, grad_A, grad_B = needs.only(x, torch.zeros_like(lora.A), torch.zeros_like(lora.B))
        x_dropped = dropped(x, lora.seed, lora.dropout_p) if needs.need_grad_A else x
        through_dropout = torch.zeros_like(x) if needs.need_grad_x else x
        for e, rows in rows_by_adapter(lora.adapter, lora.A.shape[0]):
            g = grad_y[rows]
            if needs.need_grad_B:
                grad_B[e] = lora.scalings[e] * (g.T @ s[rows])
            if not needs.need_ds:
                continue
            ds = (lora.scalings[e] * (g @ lora.B[e].to(g.dtype))).to(g.dtype)
            if needs.need_grad_A:
                grad_A[e] = ds.T @ x_dropped[rows]
            if needs.need_grad_x:
                through_dropout[rows] = ds @ lora.A[e].to(g.dtype)
        if needs.need_grad_x:
            grad_x = linear_nf4_grad_x(grad_y, weight).add_(dropped(through_dropout, lora.seed, lora.dropout_p))
        return grad_x, grad_A, grad_B

    return linear_nf4_multi_lora, linear_nf4_multi_lora_backward
