"""Linear layers of peers other than bitsandbytes and dense torch, each at its own best path.

torchao           NF4Tensor: torch's ops dequantize the weight, then its matmul. Its block constants are quantized to
                  8 bits in another way than ours, so that it has a weight of its own.
Unsloth-style     The algorithm of Unsloth, which itself needs a GPU: the weight is dequantized into one buffer that all
                  layers share, torch multiplies, and addmm adds the LoRA update in place. Both passes dequantize. The
                  dequantization is ours, which is the fastest that is measured here.
torch int8        Weight-only int8 with a scale for each row: torch._weight_int8pack_mm.
torch int4        Weight-only int4 with a scale and a zero for each group of 64: torch._weight_int4pack_mm, which is
                  _for_cpu on a CPU.
oneDNN int8       The same int8 weight, and activations that each call quantizes to int8: torch.ops.onednn, on a CPU.

The last three have no gradient and other weights than NF4; they are in the tables for comparison only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import qlora_kernels as qk

from . import layers
from .registry import Call, Case, Contender

TORCHAO_SUPERBLOCK = 256
"""Block constants of torchao that share one scale; its weights must be a multiple of this many blocks."""

TORCHAO_ROWS = (1, 16, 256, 1024)

INT4_GROUP = 64
INNER_K_TILES = 8
"""Layout of packed int4 weights on a GPU: the largest that torch's kernel has."""

MEASURED_LAYERS = ((4096, 4096), (14336, 4096), (576, 1536), (1536, 576))
"""(N, K) of the layers that are measured with all peers, and drawn over M in docs/benchmarks.md."""

Weight = tuple[int, int, int, torch.dtype, str]
"""(N, K, blocksize, dtype, device), as Case.weight."""


@lru_cache(maxsize=1)
def torchao(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str, copies: int) -> list[nn.Module]:
    """Return `copies` nn.Linear layers over torchao's NF4Tensor."""
    weight = _torchao_weight(N, K, blocksize, dtype, device)
    made: list[nn.Module] = []
    for _ in range(copies):
        layer = nn.Linear(K, N, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        made.append(layer)
    return made


@lru_cache(maxsize=1)
def _torchao_weight(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str) -> Any:
    from torchao.quantization import to_nf4

    return to_nf4(layers.source_weight(N, K, dtype, device), blocksize, TORCHAO_SUPERBLOCK)


def torchao_applies(case: Case) -> bool:
    """Whether torchao's NF4 can hold the weight and the case does not take minutes.

    Its dequantization takes 50 times as long as ours for any number of rows, so that few numbers of rows show it.
    """
    whole = case.N * case.K % (case.blocksize * TORCHAO_SUPERBLOCK) == 0
    return whole and case.N * case.K <= 4096 * 4096 and case.M in TORCHAO_ROWS


class UnslothStyle(nn.Module):
    """A frozen NF4 weight that is dequantized into a shared buffer, for torch's matmul, in forward and backward."""

    def __init__(self, layer: qk.LinearNF4, buffer: Tensor) -> None:
        super().__init__()
        self.packed, self.state, self.buffer = layer.packed, layer.quant_state, buffer

    def dequantize(self) -> Tensor:
        """Return W [N, K] in the buffer, which the next dequantization of any layer overwrites."""
        return qk.dequantize_nf4(self.packed, self.state, out=self.buffer)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T [M, N] for x [M, K]."""
        y: Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def forward_lora(self, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """Return x W^T + scaling (x A^T) B^T."""
        y: Tensor = _WithLoRA.apply(x, lora_A, lora_B, scaling, self)  # type: ignore[no-untyped-call]
        return y


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: UnslothStyle) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return grad_y @ ctx.layer.dequantize(), None


class _WithLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, layer: UnslothStyle) -> Tensor:
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        y = F.linear(x, layer.dequantize())
        y.addmm_(x @ a.T, b.T, alpha=scaling)
        ctx.save_for_backward(x, a, b)
        ctx.scaling, ctx.layer = scaling, layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, a, b = ctx.saved_tensors
        grad_s = grad_y @ b
        grad_x = grad_y @ ctx.layer.dequantize()
        grad_x.addmm_(grad_s, a, alpha=ctx.scaling)
        grad_A = (grad_s.T @ x).mul_(ctx.scaling).float()
        grad_B = (grad_y.T @ (x @ a.T)).mul_(ctx.scaling).float()
        return grad_x, grad_A, grad_B, None, None


@lru_cache(maxsize=1)
def unsloth_style(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str, copies: int) -> list[UnslothStyle]:
    """Return `copies` layers of Unsloth's algorithm, with one buffer for all."""
    buffer = torch.empty(N, K, dtype=dtype, device=device)
    return [UnslothStyle(layer, buffer) for layer in layers.ours(N, K, blocksize, dtype, device, copies)]


class Int8(nn.Module):
    """y = x W^T with W in int8 and a scale for each row, by torch's kernel for 16-bit activations."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scales = (weight.float().abs().amax(dim=1) / 127).to(weight.dtype)
        self.codes = (weight.float() / self.scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T [M, N] for x [M, K]."""
        return torch._weight_int8pack_mm(x, self.codes, self.scales)

    def dequantize(self) -> Tensor:
        """Return the layer's own weight in fp32."""
        return self.codes.float() * self.scales.float()[:, None]


class OneDNNInt8(nn.Module):
    """y = x W^T with the weight of Int8 and x quantized in each call with one scale, by oneDNN's integer kernel."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        plain = Int8(weight)
        self.scales = plain.scales.float()
        self.zeros = torch.zeros(len(self.scales), dtype=torch.int32)
        self.packed = torch.ops.onednn.qlinear_prepack(plain.codes, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T [M, N] for x [M, K]."""
        low, high = x.aminmax()
        scale = max(float(high), -float(low)) / 127
        codes = (x.float() / scale).round_().add_(128).clamp_(0, 255).to(torch.uint8)
        weight = (self.packed, self.scales, self.zeros)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, scale, 128, *weight, None, 1.0, 0, x.dtype, "none", [], ""
        )
        return y


class Int4(nn.Module):
    """y = x W^T with W in int4 and a scale and zero for each group of a row, by torch's kernel for bf16 activations."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scales, zeros = int4_codes(weight)
        self.scales_and_zeros = torch.stack((scales, zeros), dim=2).transpose(0, 1).contiguous()
        if weight.device.type == "cpu":
            self.packed = torch._convert_weight_to_int4pack_for_cpu(codes, INNER_K_TILES)
        else:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            self.packed = torch._convert_weight_to_int4pack(pairs, INNER_K_TILES)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T [M, N] for x [M, K]."""
        multiply = torch._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch._weight_int4pack_mm
        return multiply(x, self.packed, INT4_GROUP, self.scales_and_zeros)


def int4_codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes int32 [N, K] in 0..15, and scales and zeros [N, K / INT4_GROUP] in the weight's dtype.

    A weight is (code - 8) * scale + zero.
    """
    N, K = weight.shape
    groups = weight.float().view(N, K // INT4_GROUP, INT4_GROUP)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scales = ((high - low) / 15).to(weight.dtype)
    zeros = (low + 8 * scales.float()).to(weight.dtype)
    codes = (groups - zeros.float()[..., None]).div_(scales.float()[..., None]).round_().add_(8).clamp_(0, 15)
    return codes.view(N, K).to(torch.int32), scales, zeros


def _copies(make: Callable[[Tensor], nn.Module]) -> Callable[..., list[nn.Module]]:
    """Return a function that builds a layer of the source weight and copies it."""

    @lru_cache(maxsize=1)
    def build(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str, copies: int) -> list[nn.Module]:
        layer = make(layers.source_weight(N, K, dtype, device))
        return [copy.deepcopy(layer) for _ in range(copies)]

    return build


int8, int4 = _copies(Int8), _copies(Int4)


@lru_cache(maxsize=1)
def onednn_int8(N: int, K: int, blocksize: int, dtype: torch.dtype, device: str, copies: int) -> list[nn.Module]:
    """Return `copies` layers of oneDNN's int8 path; its packed weights cannot be copied."""
    return [OneDNNInt8(layers.source_weight(N, K, dtype, device)) for _ in range(copies)]


def int8_bytes(case: Case) -> int:
    """Return the bytes of a weight in int8 with its scales."""
    return case.N * case.K + 2 * case.N


def int4_bytes(case: Case) -> int:
    """Return the bytes of a weight in int4 with the scales and zeros of its groups."""
    return case.N * case.K // 2 + 4 * case.N * case.K // INT4_GROUP


def is_16_bit(case: Case) -> bool:
    """Whether x is in bf16, for which the weight-only kernels are made."""
    return case.dtype == torch.bfloat16


def has_integer_products(case: Case) -> bool:
    """Whether the processor multiplies bytes without saturation, as oneDNN's int8 kernel needs for right results."""
    if case.device != "cpu" or not torch.cpu._is_vnni_supported():
        return False
    available: bool = torch.backends.mkldnn.is_available()
    return available


def for_context(case: Case) -> bool:
    """Whether the case is of a layer for which further peers are measured, in the dtype that they support."""
    return (case.N, case.K) in MEASURED_LAYERS and is_16_bit(case) and case.isa is None


def multiplies_matrices(case: Case) -> bool:
    """Whether the case is one for which Unsloth dequantizes: for one row it calls bitsandbytes' fused kernel."""
    return case.M > 1


@lru_cache(maxsize=4)
def own_weight(contender: str, weight: Weight) -> Tensor | None:
    """Return the weight [N, K] in fp32 of a contender whose quantization differs from ours, otherwise None."""
    N, K, _, dtype, device = weight
    if contender == "torchao":
        return _torchao_weight(*weight).get_original_weight().float()  # type: ignore[no-any-return]
    if contender in ("torch int8", "oneDNN int8"):
        return Int8(layers.source_weight(N, K, dtype, device)).dequantize()
    if contender == "torch int4":
        codes, scales, zeros = int4_codes(layers.source_weight(N, K, dtype, device))
        groups = (codes.float() - 8).view(N, -1, INT4_GROUP)
        return (groups * scales.float()[..., None] + zeros.float()[..., None]).view(N, K)
    return None


Build = Callable[[Case, Any, int], Sequence[Call]]
"""The `build` of a Contender: (case, inputs, copies) -> one call for each copy."""


def training_contenders(of_layers: Callable[[Callable[..., Sequence[nn.Module]]], Build]) -> tuple[Contender, ...]:
    """Return the peers that train through a frozen layer, which the forward and the backward suite both measure.

    of_layers: takes a function that returns copies of a peer's layer, (*Case.weight, copies) -> layers, and returns the
    `build` of its contender.
    """
    return (
        Contender(
            "bnb train",
            of_layers(layers.bitsandbytes_train),
            layers.nf4_bytes,
            applies=layers.blocks_end_with_rows,
            packages=("bitsandbytes",),
        ),
        Contender("dense", of_layers(layers.dense), layers.dense_bytes),
        Contender(
            "Unsloth-style",
            of_layers(unsloth_style),
            layers.nf4_bytes,
            applies=lambda case: for_context(case) and multiplies_matrices(case),
        ),
        Contender(
            "torchao",
            of_layers(torchao),
            layers.nf4_bytes,
            applies=lambda case: for_context(case) and torchao_applies(case),
            packages=("torchao",),
        ),
    )
