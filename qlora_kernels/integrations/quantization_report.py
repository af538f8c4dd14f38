"""The quality of a model's weights in NF4: the error of each layer, and the frequency of each code.

NF4's 16 values are chosen for blocks of normally distributed weights, each divided by its largest absolute value.
`normal_shares` gives the frequency of each code among such weights; the weights of a layer with very different
frequencies are not normally distributed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..format import nf4
from ..io.streaming import read_tensors
from ..nn.match import Pattern
from ..ops.dequantize_nf4 import dequantize_nf4
from ..ops.quantize_nf4 import quantize_nf4
from .model_structure import ModelError, ModelStructure

CODES = len(nf4.CODE)
_GRID = 4001
_FARTHEST = 8.0
"""Upper limit of the integral over a block's largest weight, in standard deviations."""


@dataclass(frozen=True)
class LayerError:
    """The error of one layer after quantization to NF4.

    relative: root mean square of the error, divided by that of the weights.   largest: largest absolute error.
    bits: stored bits per weight, with its constants.
    shares: frequency of each of the 16 codes, as a fraction of the weights.
    divergence: Kullback-Leibler divergence of the shares from those of normal weights, in bits.
    """

    name: str
    shape: tuple[int, ...]
    relative: float
    largest: float
    bits: float
    shares: tuple[float, ...]
    divergence: float


@dataclass
class QuantizationReport:
    """The errors of all layers of a model.

    blocksize, double_quant: those of the quantized weights.
    normal: frequency of each code among normally distributed weights.
    """

    blocksize: int
    double_quant: bool
    normal: tuple[float, ...]
    layers: list[LayerError] = field(default_factory=list)

    @property
    def relative(self) -> float:
        """Return the root mean square of the layers' relative errors, each weighted by its number of weights."""
        total = sum(math.prod(layer.shape) for layer in self.layers)
        return math.sqrt(sum(layer.relative**2 * math.prod(layer.shape) for layer in self.layers) / total)

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the frequency of each code in all layers together."""
        total = sum(math.prod(layer.shape) for layer in self.layers)
        sums = [sum(layer.shares[i] * math.prod(layer.shape) for layer in self.layers) for i in range(CODES)]
        return tuple(value / total for value in sums)


def quantization_report(
    folder: Path,
    *,
    skip: Pattern = ("lm_head",),
    blocksize: int = nf4.DEFAULT_BLOCKSIZE,
    double_quant: bool = True,
    device: torch.device | str | None = None,
    on_layers: Callable[[int], object] = lambda n: None,
    on_layer: Callable[[], object] = lambda: None,
) -> QuantizationReport:
    """Quantize each linear layer of a dense model folder except those in `skip`, one at a time, and measure its error.

    device: where weights are quantized.   on_layers: called with the number of layers, then on_layer after each layer.
    Raises ModelError if the files do not match the model in config.json or there is no such layer.
    """
    structure = ModelStructure(folder)
    tensors = read_tensors(folder)
    structure.require_match({name: tensor.shape for name, tensor in tensors.items()})
    layers = set(structure.linear_layers(skip))
    chosen = {name: str(structure.parameter_of(name)).removesuffix(".weight") for name in tensors}
    chosen = {name: layer for name, layer in chosen.items() if layer in layers and name.endswith(".weight")}
    if not chosen:
        raise ModelError(f"{folder}: must have linear layers (nn.Linear, Conv1D) that skip leaves, got none")
    on_layers(len(chosen))
    report = QuantizationReport(blocksize, double_quant, normal_shares(blocksize))
    for name, layer in chosen.items():
        weight = tensors[name].T.contiguous() if structure.is_transposed(layer) else tensors[name]
        report.layers.append(layer_error(layer, weight.to(device), blocksize, double_quant))
        on_layer()
    return report


def layer_error(name: str, weight: Tensor, blocksize: int, double_quant: bool) -> LayerError:
    """Quantize a weight of any float dtype and measure the error. name: of the result."""
    exact = weight.float()
    packed, state = quantize_nf4(exact, blocksize, double_quant)
    error = dequantize_nf4(packed, state) - exact
    counts = torch.bincount(nf4.unpack(packed, exact.numel()).flatten().int(), minlength=CODES)
    shares = tuple((counts.double() / exact.numel()).tolist())
    norm = float(torch.linalg.vector_norm(exact.double()))
    relative = float(torch.linalg.vector_norm(error.double())) / norm if norm else 0.0
    divergence = sum(p * math.log2(p / q) for p, q in zip(shares, normal_shares(blocksize), strict=True) if p)
    return LayerError(
        name,
        tuple(exact.shape),
        relative,
        float(error.abs().max()),
        state.bits_per_param,
        shares,
        max(divergence, 0.0),
    )


def normal_shares(blocksize: int) -> tuple[float, ...]:
    """Return the frequency of each NF4 code among blocks of independent normal weights.

    A block's largest absolute value m has the density n (2 Phi(m) - 1)^(n - 1) 2 phi(m). The weight with this value
    becomes -1 or 1; the others are normally distributed within [-m, m]. The integral over m is a sum over a fine grid.
    """
    n = blocksize
    m = torch.linspace(_FARTHEST / _GRID, _FARTHEST, _GRID, dtype=torch.float64)
    inside = torch.erf(m / math.sqrt(2))
    density = inside ** (n - 1) * torch.exp(-m * m / 2)
    density /= density.sum()
    edges = torch.cat([torch.tensor([-1.0]), nf4.boundaries().double(), torch.tensor([1.0])]).double()
    below = (torch.erf(m[:, None] * edges / math.sqrt(2)) + inside[:, None]) / (2 * inside[:, None])
    shares = (density[:, None] * below.diff(dim=1)).sum(0) * (n - 1) / n
    shares[0] += 0.5 / n
    shares[-1] += 0.5 / n
    return tuple(shares.tolist())
