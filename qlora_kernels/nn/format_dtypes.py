"""Casts of a quantized module: its buffers keep the dtypes that the format gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..format.quant_state import FLOAT_DTYPES


class QuantizedModule(Protocol):
    """What has packed bytes, their constants and the dtype that its weight is dequantized to."""

    weight_dtype: torch.dtype


def apply_but_keep_dtypes(
    module: QuantizedModule, buffers: Sequence[str], fn: Callable[[Tensor], Tensor], apply: Callable[[], Any]
) -> None:
    """Run `apply`, nn.Module._apply(fn), a cast or a move: buffers keep their dtypes, and weight_dtype follows it.

    module.half() and .to(bf16) reach every float buffer, module.type(dtype) the packed bytes too.
    """
    before = {name: tensor for name in buffers if (tensor := getattr(module, name)) is not None}
    apply()
    for name, tensor in before.items():
        after = getattr(module, name)
        if after.dtype != tensor.dtype:
            setattr(module, name, tensor.to(after.device))
    # What becomes of a dense weight's dtype: the constants do not show a cast back to fp32, which they are in.
    of_weight = fn(torch.empty(0, dtype=module.weight_dtype, device=next(iter(before.values())).device)).dtype
    if of_weight in FLOAT_DTYPES:
        module.weight_dtype = of_weight
