"""The low-rank term inside the base product: its torch reference against float64, and the rule that chooses it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_kernels.backends.reference.codec import dequantize_nf4
from qlora_kernels.backends.reference.linear_nf4 import dense
from qlora_kernels.format import double_quant, reference
from qlora_kernels.ops import extended_k
from qlora_kernels.ops.operands import GroupLoRA, Weight
from qlora_kernels.ops.philox import dropout_keep, dropped, keep_scale
from tests.support.linear_formulas import Arithmetic, Dropout, lora_backward, lora_forward
from tests.support.problems import DTYPES, dtype_name, gaussian
from tests.support.tolerances import assert_within

M, K, WIDTHS, RANKS, SCALINGS = 9, 40, (24, 17, 24), (3, 16, 20), (0.7, 2.0, 1.3)


def decode(weight: Weight, out: Tensor) -> None:
    dense_w = torch.empty(weight.N, weight.K, dtype=out.dtype)
    dequantize_nf4(weight, out=dense_w)
    out.copy_(dense_w)


def quantized(N: int, seed: int) -> Weight:
    packed, absmax = reference.quantize_nf4(gaussian(N, K, seed=seed) / K**0.5, 64)
    return Weight(packed, None, *double_quant.quantize_absmax(absmax), 64, N, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference(dtype: torch.dtype, p: float) -> None:
    """Unequal widths, ranks that are padded, masters of lora_B in another dtype, with and without a bias."""
    weights = [quantized(N, i) for i, N in enumerate(WIDTHS)]
    x, seed = gaussian(M, K, seed=4, dtype=dtype), torch.tensor([7])
    masters = (torch.float32, dtype, torch.bfloat16)
    B = [gaussian(N, r, seed=6).to(torch.bfloat16).to(of) for N, r, of in zip(WIDTHS, RANKS, masters, strict=True)]
    A = (gaussian(sum(RANKS), K, seed=7) / K**0.5).to(dtype).float()
    lora, biases = GroupLoRA(A, B, seed, SCALINGS, p), [gaussian(WIDTHS[0], seed=5), None, None]
    grad_ys = [gaussian(M, N, seed=8, dtype=dtype) for N in WIDTHS]
    dropout = Dropout(dropout_keep(seed, M, K, p), keep_scale(p)) if p else None

    both = extended_k.operand(x, K, max(RANKS)).fill_(torch.nan)
    both[:, :K] = x
    s = dropped(x, seed, p) @ lora.A.to(dtype).T
    ys = extended_k.forward(both, s, weights, biases, lora, decode)
    assert all(y.is_contiguous() for y in ys)

    ds = torch.cat([scaling * (g @ b.to(dtype)) for g, b, scaling in zip(grad_ys, B, SCALINGS, strict=True)], dim=1)
    both = extended_k.operand(x, sum(WIDTHS), 0 if p else lora.r).fill_(torch.nan)
    both[:, : sum(WIDTHS)] = torch.cat(grad_ys, dim=1)
    grad_x = extended_k.backward(both, weights, None if p else (ds, A), decode)
    if p:
        grad_x = grad_x + dropped(ds @ A.to(dtype), seed, p)

    arithmetic, total = Arithmetic(dtype, factor_may_be_scaled=True), None
    for i, (part, member) in enumerate(zip(s.split(RANKS, dim=1), lora.split_per_linear(), strict=True)):
        w, factors = dense(weights[i], x), (member.B, member.scaling)
        assert_within(ys[i], lora_forward(x, w, biases[i], part, *factors, arithmetic), f"y_{i}")
        expected = lora_backward(grad_ys[i], x, part, w, member.A, *factors, dropout, arithmetic).x
        total = expected if total is None else total + expected
    assert total is not None
    assert_within(grad_x, total.to(dtype), "grad_x")


def test_factors_of_another_16_bit_dtype_are_rounded_once() -> None:
    """scaling * B of a bf16 master under fp16 activations: fp16 holds three bits more than bf16."""
    weight, B = quantized(8, 0), torch.full((8, 1), 1.0078125, dtype=torch.bfloat16)
    lora = GroupLoRA(torch.zeros(1, K), [B], None, [1.5], 0.0)
    both = torch.zeros(1, K + extended_k.COLUMNS, dtype=torch.float16)
    (y,) = extended_k.forward(both, torch.ones(1, 1, dtype=torch.float16), [weight], [None], lora, decode)
    assert y.tolist() == [[1.51171875] * 8]


def test_forward_rule() -> None:
    def pays(K: int, N: int, capability: int = 90) -> bool:
        return extended_k.forward_obstacle(K, N, torch.bfloat16, capability) is None

    assert pays(4096, 4096)
    assert pays(4096, 14336)
    assert not pays(14336, 4096)
    assert pays(6144, 4096)
    assert not pays(6144, 4096, 86), "an RTX 3090 has fewer products for a byte"
    assert pays(6144, 4096, 103), "the nearest capability below"
    assert extended_k.forward_obstacle(64, 64, torch.float32, 90) is not None


def test_backward_rule() -> None:
    def pays(K: int, N: int, linears: int, dropout: bool = False) -> bool:
        return extended_k.backward_obstacle(K, N, linears, dropout, torch.bfloat16, 90) is None

    assert pays(4096, 4096, 1)
    assert not pays(4096, 4096, 1, dropout=True), "the mask applies to ds A alone"
    assert not pays(4096, 14336, 1)
    assert pays(14336, 4096, 1)
    assert pays(4096, 3 * 4096, 3)
    assert pays(4096, 3 * 4096, 3, dropout=True), "the sum over the linears is still one product"
    assert not pays(4096, 2 * 14336, 2)
