"""Kernel arguments that launchers add: pointers to a weight's constants, and small tables in device memory."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...format.double_quant import dynamic_boundaries, dynamic_map
from ...ops.operands import Weight


class AbsmaxPointers(NamedTuple):
    """The four pointers that `load_absmax` takes.

    stored_absmax: absmax (fp32), or absmax_q (uint8) under double quantization; without it, the last three repeat
    absmax and are not used.
    """

    stored_absmax: Tensor
    absmax_map: Tensor
    absmax_scale: Tensor
    absmax_offset: Tensor


def absmax_pointers(weight: Weight) -> AbsmaxPointers:
    """Return the kernels' four pointers to a weight's constants."""
    _, absmax, absmax_q, absmax_scale, absmax_offset, *_ = weight
    if absmax is not None:
        return AbsmaxPointers(absmax, absmax, absmax, absmax)
    assert absmax_q is not None
    assert absmax_scale is not None
    assert absmax_offset is not None
    # In a third of the time of AbsmaxPointers(...), once for each call of a layer.
    return tuple.__new__(AbsmaxPointers, (absmax_q, absmax_map(absmax_q.device), absmax_scale, absmax_offset))


@cache
def absmax_map(device: torch.device) -> Tensor:
    """Return the dynamic map, fp32 [256], made once per device, so that captured graphs use a stable address."""
    return dynamic_map(device)


@cache
def absmax_boundaries(device: torch.device) -> Tensor:
    """Return the map's 255 decision boundaries, with +inf as the 256th."""
    boundaries = dynamic_boundaries("cpu")
    return torch.cat([boundaries, torch.tensor([torch.inf])]).to(device)
