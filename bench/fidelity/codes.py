"""4-bit data types as code tables, and weights rounded to them.

Every type stores a weight as the nearest of its code values times the largest magnitude of the weight's block. NF4 runs
through the package's own codec; the others have no kernel, so that their weights are dense tensors with few values.

Sources: NF4: QLoRA (arXiv:2305.14314) appendix E. FP4 E2M1: the OCP Microscaling Formats specification, table of FP4.
FP4 of bitsandbytes, int4 and AF4: bitsandbytes 0.50, functional.get_4bit_type. AF4: arXiv:2306.06965, for blocks of 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels.format import nf4
from qlora_kernels.rounding import cdiv


def _signed(*magnitudes: float) -> tuple[float, ...]:
    """Return both signs of the magnitudes and zero, ascending, scaled to [-1, 1]."""
    top = max(magnitudes)
    positive = sorted(magnitude / top for magnitude in magnitudes)
    return (*(-value for value in reversed(positive)), 0.0, *positive)


CODES: dict[str, tuple[float, ...]] = {
    "NF4": nf4.CODE,
    "AF4": (
        *(-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812),
        0.0,
        *(0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
    ),
    "FP4 E2M1": _signed(0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "FP4 bitsandbytes": _signed(0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0),
    "int4": _signed(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
}
"""Type -> its values in ascending order. int4 and both FP4 use 15 of the 16 bit patterns: zero has two."""

DOUBLE_QUANTIZED = "NF4 + DQ"
"""NF4 whose block constants are stored in 8 bits (format/double_quant.py)."""

ONLY_BLOCKSIZE = {"AF4": 64}
"""AF4 depends on the blocksize; the published table is the one for blocks of 64."""


def indices(w: Tensor, kind: str, blocksize: int) -> Tensor:
    """Return the index into CODES[kind] of each weight's nearest value, int64 [w.numel()]."""
    return _nearest(w, kind, blocksize)[0]


def rounded(w: Tensor, kind: str, blocksize: int) -> Tensor:
    """Return a weight of any shape after rounding to a 4-bit type, in the weight's dtype.

    kind: a name in CODES, or DOUBLE_QUANTIZED.   blocksize: elements of a block, which run row-major over w.
    """
    if kind in ("NF4", DOUBLE_QUANTIZED):
        packed, state = qk.quantize_nf4(w, blocksize=blocksize, double_quant=kind == DOUBLE_QUANTIZED)
        return qk.dequantize_nf4(packed, state)
    q, absmax = _nearest(w, kind, blocksize)
    values = torch.tensor(CODES[kind], dtype=torch.float32)[q]
    return (values * absmax.repeat_interleave(blocksize)[: q.numel()]).to(w.dtype).view(w.shape)


def _nearest(w: Tensor, kind: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return indices int64 [n] and absmax fp32 [blocks], by the rules of format/nf4.py."""
    code = torch.tensor(CODES[kind], dtype=torch.float32)
    blocks = cdiv(w.numel(), blocksize)
    padded = torch.zeros(blocks * blocksize)
    padded[: w.numel()] = w.reshape(-1).float()
    padded = padded.view(blocks, blocksize)
    absmax = padded.abs().amax(dim=1)
    absmax = torch.where(absmax < nf4.SMALLEST_ABSMAX, 0.0, absmax)
    normalized = padded * torch.where(absmax > 0, 1.0 / absmax, 0.0)[:, None]
    q = torch.bucketize(normalized, (code[:-1] + code[1:]) / 2)
    return q.reshape(-1)[: w.numel()], absmax
