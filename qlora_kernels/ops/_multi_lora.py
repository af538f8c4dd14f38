"""The low-rank part of a batch whose rows use different adapters, in plain torch, grouped by adapter.

`over` makes the kernels of linear_nf4_multi_lora from a backend's plain linear. Rows are gathered once an adapter,
so the work is that of the rows, not of rows times adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._philox import dropout_keep, keep_scale


def rows_by_adapter(adapter: Tensor, n_adapters: int) -> Iterator[tuple[int, Tensor]]:
    """(adapter, its row numbers) for each adapter that has rows. adapter: int64 [M], -1 means none."""
    order = adapter.argsort(stable=True)
    counts = torch.bincount(adapter + 1, minlength=n_adapters + 1).tolist()
    for index, rows in enumerate(torch.split(order, counts)):
        if index > 0 and rows.numel():
            yield index - 1, rows


def dropped(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """dropout(x) for x [M, K], by the mask of _philox.py."""
    if seed is None or dropout_p == 0.0:
        return x
    keep = dropout_keep(seed, x.shape[0], x.shape[1], dropout_p)
    return torch.where(keep, x * keep_scale(dropout_p), 0.0)


def add_forward(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    adapter: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """y[m] += scalings[e] * (dropout(x[m]) A_e^T) B_e^T for e = adapter[m], in place. Returns s [M, r]."""
    s = x.new_zeros(x.shape[0], lora_A.shape[1])
    x = dropped(x, seed, dropout_p)
    for e, rows in rows_by_adapter(adapter, lora_A.shape[0]):
        part = x[rows] @ lora_A[e].to(x.dtype).T
        s[rows] = part
        y[rows] += (scalings[e] * (part @ lora_B[e].to(x.dtype).T)).to(y.dtype)
    return s


def add_backward(
    grad_x: Tensor | None,
    grad_y: Tensor,
    x: Tensor,
    s: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    adapter: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Adds the low-rank part to grad_x in place, where given. Returns (grad_A, grad_B) in the masters' dtypes."""
    grad_A, grad_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    x_dropped = dropped(x, seed, dropout_p)
    through_dropout = torch.zeros_like(x)
    for e, rows in rows_by_adapter(adapter, lora_A.shape[0]):
        g = grad_y[rows]
        ds = (scalings[e] * (g @ lora_B[e].to(g.dtype))).to(g.dtype)
        grad_B[e] = scalings[e] * (g.T @ s[rows])
        grad_A[e] = ds.T @ x_dropped[rows]
        if grad_x is not None:
            through_dropout[rows] = ds @ lora_A[e].to(g.dtype)
    if grad_x is not None:
        grad_x += dropped(through_dropout, seed, dropout_p)
    return grad_A, grad_B


def over(
    linear_nf4: Callable[..., Tensor], linear_nf4_grad_x: Callable[..., Tensor]
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """linear_nf4_multi_lora and linear_nf4_multi_lora_backward over one backend's plain linear and its gradient."""

    def linear_nf4_multi_lora(
        x: Tensor,
        packed: Tensor,
        absmax: Tensor | None,
        absmax_q: Tensor | None,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scalings: Tensor,
        adapter: Tensor,
        seed: Tensor | None,
        *,
        dropout_p: float,
        blocksize: int,
        out_features: int,
    ) -> tuple[Tensor, Tensor]:
        """(y, s)."""
        constants = (absmax, absmax_q, absmax_scale, absmax_offset)
        y = linear_nf4(x, packed, *constants, bias, blocksize=blocksize, out_features=out_features)
        return y, add_forward(y, x, lora_A, lora_B, scalings, adapter, seed, dropout_p)

    def linear_nf4_multi_lora_backward(
        grad_y: Tensor,
        x: Tensor,
        s: Tensor,
        packed: Tensor,
        absmax: Tensor | None,
        absmax_q: Tensor | None,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scalings: Tensor,
        adapter: Tensor,
        seed: Tensor | None,
        *,
        dropout_p: float,
        blocksize: int,
        need_grad_x: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(grad_x or empty, grad_A, grad_B)."""
        constants = (absmax, absmax_q, absmax_scale, absmax_offset)
        grad_x = None
        if need_grad_x:
            grad_x = linear_nf4_grad_x(grad_y, packed, *constants, blocksize=blocksize, in_features=x.shape[1])
        grad_A, grad_B = add_backward(grad_x, grad_y, x, s, lora_A, lora_B, scalings, adapter, seed, dropout_p)
        return x.new_empty(0) if grad_x is None else grad_x, grad_A, grad_B

    return linear_nf4_multi_lora, linear_nf4_multi_lora_backward
