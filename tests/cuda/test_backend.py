"""qlora_kernels/backends/cuda: the built library loads everywhere, and its functions implement the ops' contracts.

The functions run on CPU tensors: the library's private ops get CPU implementations that call the launchers in the
emulator. This tests the path from an op's arguments to the launcher and back.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels.backends import cuda
from qlora_kernels.backends.cuda import routing
from qlora_kernels.backends.cuda.managed_memory import tensor_of
from qlora_kernels.format import double_quant, reference
from qlora_kernels.ops import extended_k, registry
from qlora_kernels.ops.operands import GroupLoRA, LoRA, Needs, Weight
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from qlora_kernels.ops.registry import Problem
from tests.support.linear_formulas import (
    Arithmetic,
    Dropout,
    arithmetic_of,
    assert_lora,
    assert_lora_merged,
    lora_backward,
    lora_down,
    lora_forward,
)
from tests.support.problems import DTYPES, gaussian
from tests.support.tolerances import assert_within

from .emulated_ops import emulated_ops
from .launch_args import MULTIPROCESSORS
from .launching import (
    library,
    load_bindings,
    needs_emulator,
    needs_library,
    quantized,
    same_bits,
)

pytestmark = [needs_library, needs_emulator]

OP = importlib.import_module("qlora_kernels.ops.quantize_nf4")
ROUTING = importlib.import_module("qlora_kernels.backends.cuda.linear_nf4")  # the package names the function so too


@pytest.fixture(autouse=True)
def _emulated_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the private ops of the library in the emulator during one test."""
    load_bindings()
    monkeypatch.setattr(ROUTING, "_multiprocessors", lambda device: MULTIPROCESSORS)
    with emulated_ops():
        yield


def test_library_lists_every_op() -> None:
    listed = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("qlora_kernels_C::cuda_")]
    with_kernels = [name for name in listed if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
    assert {name.split("::cuda_")[1] for name in with_kernels} >= {
        "dequantize_nf4",
        "quantize_nf4",
        "quantize_absmax",
        "linear_nf4_small_m",
        "linear_nf4_pairs",
        "linear_nf4_gemm",
        "linear_nf4_wgmma",
        "lora_down",
        "merge_lora",
        "adamw_step",
        "managed_allocate",
        "managed_prefetch",
        "page_locked_allocate",
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codec(dtype: torch.dtype) -> None:
    w = gaussian(33, 67, dtype=dtype)
    packed, absmax = cuda.codec.quantize_nf4(w, blocksize=64)
    expected_packed, _, expected_absmax = quantized(w, 64, False)
    assert same_bits(packed, expected_packed)
    assert same_bits(absmax, expected_absmax)
    nested = cuda.codec.quantize_absmax(absmax)
    assert nested[2].shape == ()
    absmax = double_quant.dequantize_absmax(*nested)
    result = torch.empty_like(w)
    cuda.codec.dequantize_nf4(Weight(packed, None, *nested, 64, *w.shape), out=result)
    assert same_bits(result, reference.dequantize_nf4(packed, absmax, 64, w.shape, dtype))


def test_public_quantize_is_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """qk.quantize_nf4 with double quantization, run as the op runs it on this backend."""
    kernels = {spec.op: spec for spec in cuda.KERNELS}
    monkeypatch.setattr(OP, "select", lambda problem: kernels[problem.op])
    w, recorded = gaussian(65, 67, dtype=torch.bfloat16), library("quantize_nf4", "plain")
    recorded.calls()
    packed, state = qk.quantize_nf4(w)
    assert [call.name for call in recorded.calls()] == ["launch", "launch"]
    expected_packed, expected_absmax = reference.quantize_nf4(w, 64)
    nested = double_quant.quantize_absmax(expected_absmax, state.absmax_offset)
    assert same_bits(packed.view(-1), expected_packed)
    assert same_bits(state.absmax, double_quant.dequantize_absmax(*nested))
    mean = expected_absmax.double().mean().item()
    assert state.absmax_offset is not None
    assert abs(state.absmax_offset.item() - mean) <= torch.finfo(torch.float32).eps * mean


# Rows on both sides of every threshold, supported and unsupported K and N, and ranks that need padding.
SHAPES = [
    (1, 24, 96, 3),
    (4, 17, 256, 5),
    (5, 40, 704, 5),
    (17, 24, 96, 8),
    (64, 16, 64, 16),
    (129, 24, 64, 4),
    (3, 12, 50, 4),
]


def quantized_matrix(N: int, K: int) -> Weight:
    packed, constants, _ = quantized(gaussian(N, K, seed=1) * 0.05, 64, True)
    return Weight(packed, *constants, 64, N, K)


def dequantized(weight: Weight, dtype: torch.dtype) -> Tensor:
    absmax = double_quant.dequantize_absmax(*weight.constants[1:])
    return reference.dequantize_nf4(weight.packed, absmax, weight.blocksize, torch.Size((weight.N, weight.K)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "r"), SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_linear_with_lora(p: float, M: int, N: int, K: int, r: int, dtype: torch.dtype) -> None:
    weight = quantized_matrix(N, K)
    x, bias, grad_y = gaussian(M, K, dtype=dtype, seed=2), gaussian(N, seed=3), gaussian(M, N, dtype=dtype, seed=6)
    lora_A = (gaussian(r, K, seed=4) * 0.1).to(dtype).float()
    seed = torch.tensor([9])
    dropout = Dropout(dropout_keep(seed, M, K, p), keep_scale(p)) if p else None
    lora = LoRA(lora_A, (gaussian(N, r, seed=5) * 0.1).to(dtype).float(), seed, 0.5, p)
    y, s = cuda.linear_nf4_lora(x, weight, bias, lora)
    gradients = cuda.linear_nf4_lora_backward(grad_y, x, s, weight, lora, Needs())
    inputs = (x, dequantized(weight, dtype), bias, lora.A, lora.B, grad_y)
    assert_lora((y, s, *gradients), inputs, lora.scaling, dropout, arithmetic_of("cuda", dtype))
    assert cuda.linear_nf4(x, weight, None).shape == (M, N)
    assert cuda.linear_nf4_grad_x(grad_y, weight).shape == (M, K)


@pytest.mark.parametrize("path", ["pairs", "small_m", "fused", "decode"])
@pytest.mark.parametrize("M", [1, 16, 33])
def test_every_path_serves_lora(M: int, path: str) -> None:
    """The kernels that can be selected for few rows compute one LoRA linear, each within the bounds of its rounding."""
    N, K, r = 17, 512, 5
    weight, x, bias = quantized_matrix(N, K), gaussian(M, K, dtype=torch.bfloat16, seed=2), gaussian(N, seed=3)
    factors = [(gaussian(*size, seed=4) * 0.1).bfloat16().float() for size in ((r, K), (N, r))]
    lora = LoRA(*factors, None, 0.5, 0.0)
    with routing.use_path(path):
        y, s = cuda.linear_nf4_lora(x, weight, bias, lora)
    arithmetic, w = arithmetic_of("cuda", torch.bfloat16), dequantized(weight, torch.bfloat16)
    assert_within(y, lora_forward(x, w, bias, s, lora.B, lora.scaling, arithmetic), path)


@pytest.mark.parametrize(("M", "dtype"), [(16, torch.float16), (70, torch.bfloat16), (200, torch.bfloat16)], ids=str)
def test_wgmma_serves_lora(M: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an H100, with a library that holds sm_90a code; the rank is padded."""
    monkeypatch.setattr(ROUTING, "_capability", lambda device: 90)
    monkeypatch.setattr(routing, "holds_sm90a", lambda: True)
    N, K, r = 40, 320, 5
    weight, x, bias = quantized_matrix(N, K), gaussian(M, K, dtype=dtype, seed=2), gaussian(N, seed=3)
    factors = [(gaussian(*size, seed=4) * 0.1).to(dtype).float() for size in ((r, K), (N, r))]
    lora = LoRA(*factors, None, 0.5, 0.0)
    launches = library("linear_nf4_wgmma", "plain")
    launches.calls()
    grad_y = gaussian(M, N, dtype=dtype, seed=6)
    with routing.use_path("wgmma"):
        y, s = cuda.linear_nf4_lora(x, weight, bias, lora)
        gradients = cuda.linear_nf4_lora_backward(grad_y, x, s, weight, lora, Needs())
    assert [call.name for call in launches.calls()].count("launch") == 2, "y and grad_x"
    inputs = (x, dequantized(weight, dtype), bias, lora.A, lora.B, grad_y)
    assert_lora((y, s, *gradients), inputs, lora.scaling, None, arithmetic_of("cuda", dtype))


@dataclass(frozen=True)
class Group:
    """Linears on one x [M, K] with LoRA, and the gradients of their outputs. The second linear has no bias."""

    x: Tensor
    weights: list[Weight]
    biases: list[Tensor | None]
    lora: GroupLoRA
    grad_ys: list[Tensor]

    @classmethod
    def of(cls, M: int, K: int, widths: Sequence[int], ranks: Sequence[int], p: float, dtype: torch.dtype) -> Group:
        """Return the problem of linears with `widths` outputs and LoRA of `ranks`."""
        B = [(gaussian(N, r, seed=5) * 0.1).to(dtype).float() for N, r in zip(widths, ranks, strict=True)]
        A = (gaussian(sum(ranks), K, seed=4) * 0.1).to(dtype).float()
        return cls(
            gaussian(M, K, dtype=dtype, seed=2),
            [quantized_matrix(N, K) for N in widths],
            [gaussian(widths[0], seed=3), None][: len(widths)],
            GroupLoRA(A, B, torch.tensor([9]), [0.7, 2.0][: len(B)], p),
            [gaussian(M, N, dtype=dtype, seed=6 + N) for N in widths],
        )

    def check(self, *, round_each_sum: bool) -> None:
        """Run the op and its backward, and compare each linear with the formulas of a single one.

        round_each_sum: whether the sum of the linears' grad_x is rounded to x's dtype after each addition, or once.
        """
        x, lora, dtype = self.x, self.lora, self.x.dtype
        ys, s = cuda.linear_nf4_lora_group(x, self.weights, self.biases, lora)
        grad_x, grad_A, grads_B = cuda.linear_nf4_lora_group_backward(self.grad_ys, x, s, self.weights, lora, Needs())
        p, arithmetic, of_members = lora.dropout_p, arithmetic_of("cuda", dtype), []
        dropout = Dropout(dropout_keep(lora.seed, *x.shape, p), keep_scale(p)) if p else None
        parts, grads_A = s.split(lora.ranks, dim=1), grad_A.split(lora.ranks)
        for i, member in enumerate(lora.split_per_linear()):
            w, factors = dequantized(self.weights[i], dtype), (member.B, member.scaling)
            assert_within(parts[i], lora_down(x, member.A, dropout, arithmetic), f"s_{i}")
            assert_within(ys[i], lora_forward(x, w, self.biases[i], parts[i], *factors, arithmetic), f"y_{i}")
            expected = lora_backward(self.grad_ys[i], x, parts[i], w, member.A, *factors, dropout, arithmetic)
            assert_within(grads_A[i], expected.lora_A, f"grad of A_{i}")
            assert_within(grads_B[i], expected.lora_B, f"grad of B_{i}")
            of_members.append(expected.x)
        total = of_members[0]
        for grad in of_members[1:]:
            total = (total + grad).to(dtype) if round_each_sum else total + grad
        assert_within(grad_x, total if round_each_sum else total.to(dtype), "grad_x")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [3, 129])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_group(p: float, M: int, dtype: torch.dtype) -> None:
    """Fused (small M) and decoded weights (large M)."""
    Group.of(M, 64, (24, 17), (4, 3), p, dtype).check(round_each_sum=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("K", "widths", "ranks"), [(64, (56,), (5,)), (72, (48, 24), (8, 16)), (64, (48, 40), (70, 3))]
)
def test_products_over_k_and_r(
    monkeypatch: pytest.MonkeyPatch,
    K: int,
    widths: tuple[int, ...],
    ranks: tuple[int, ...],
    p: float,
    dtype: torch.dtype,
) -> None:
    """The low-rank term inside the base product, forward and backward, within the bounds of the other paths.

    Ranks that are padded, several launches of lora_down, and (72 columns) rows that end inside a block.
    """
    used = []
    for name in ("forward", "backward"):
        real = getattr(extended_k, name)
        monkeypatch.setattr(extended_k, name, lambda *a, _name=name, _real=real: (used.append(_name), _real(*a))[1])
    Group.of(133, K, widths, ranks, p, dtype).check(round_each_sum=False)
    assert used == (["forward"] if p and len(widths) == 1 else ["forward", "backward"])


@pytest.mark.parametrize(
    ("dtype", "M", "K", "r"),
    [
        (torch.bfloat16, 133, 64, 5),
        (torch.float16, 133, 128, 33),
        (torch.bfloat16, 133, 72, 4),  # columns that merge_lora.cu does not take
        (torch.float16, 133, 64, 70),  # a rank that it does not take
        (torch.float32, 133, 64, 4),
        (torch.bfloat16, 7, 64, 4),  # few rows: the update stays apart
    ],
    ids=str,
)
def test_merged_update(dtype: torch.dtype, M: int, K: int, r: int) -> None:
    N = 40
    weight, x, bias = quantized_matrix(N, K), gaussian(M, K, dtype=dtype, seed=2), gaussian(N, seed=3)
    A, B = ((gaussian(*size, seed=4) * 0.1).to(dtype).float() for size in ((r, K), (N, r)))
    lora, grad_y = LoRA(A, B, None, 0.7, 0.0), gaussian(M, N, dtype=dtype, seed=6)
    y = cuda.linear_nf4_lora_merged(x, weight, bias, lora)
    gradients = cuda.linear_nf4_lora_merged_backward(grad_y, x, weight, lora, Needs())
    inputs = (x, dequantized(weight, torch.float32), bias, A, B, grad_y)
    assert_lora_merged((y, *gradients), inputs, lora.scaling, arithmetic_of("cuda", dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_the_factors_are_not_rounded_to_the_activations(dtype: torch.dtype) -> None:
    """fp32 sums, as the Triton backend returns them."""
    M, N, K, r = 96, 24, 64, 4
    weight, x, grad_y = quantized_matrix(N, K), gaussian(M, K, dtype=dtype, seed=2), gaussian(M, N, dtype=dtype, seed=6)
    factors = [(gaussian(*size, seed=4) * 0.1).to(dtype).float() for size in ((r, K), (N, r))]
    lora = LoRA(*factors, None, 0.5, 0.0)
    _, s = cuda.linear_nf4_lora(x, weight, None, lora)
    _, *gradients = cuda.linear_nf4_lora_backward(grad_y, x, s, weight, lora, Needs(need_grad_x=False))
    arithmetic = Arithmetic(dtype, composed=False)
    expected = lora_backward(grad_y, x, s, dequantized(weight, dtype), *factors, lora.scaling, None, arithmetic)
    for name, actual, bound in zip("AB", gradients, expected[1:], strict=True):
        assert_within(actual, bound, f"grad of lora_{name}")
        assert (actual.to(dtype).float() != actual).float().mean() > 0.5, "rounded"


def test_a_misaligned_slice_is_copied() -> None:
    weight = quantized_matrix(8, 64)
    x = torch.empty(65)[1:].view(1, 64).copy_(gaussian(1, 64))
    assert same_bits(cuda.linear_nf4(x, weight, None), cuda.linear_nf4(x.clone(), weight, None))


@pytest.mark.parametrize(
    ("available", "with_dropout", "without"),
    [(("cuda", "triton"), "triton", "cuda"), (("cuda",), "cuda", "cuda"), ((), "reference", "reference")],
)
def test_dropout_prefers_triton_if_available(
    monkeypatch: pytest.MonkeyPatch, available: tuple[str, ...], with_dropout: str, without: str
) -> None:
    usable = (*available, "reference")
    monkeypatch.setattr(registry, "unavailable", lambda name: None if name in usable else "not here")
    monkeypatch.setattr(registry, "_warn_once", lambda message: None)
    for op in (
        "linear_nf4_lora",
        "linear_nf4_lora_backward",
        "linear_nf4_lora_group",
        "linear_nf4_lora_group_backward",
    ):
        for dropout, expected in ((True, with_dropout), (False, without)):
            problem = Problem(op, "cuda", torch.bfloat16, 64, 128, 128, 8, dropout=dropout)
            assert registry._select.__wrapped__(problem, None).backend == expected


def test_tensor_of_calls_deleter_once() -> None:
    """The deleter is called once, with the last view of the tensor."""
    freed = []
    deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(freed.append)
    data, shape = (ctypes.c_uint8 * 64)(*range(64)), (ctypes.c_int64 * 1)(64)
    cpu, unsigned = 1, 1
    words = [ctypes.addressof(data), cpu | 0 << 32, 1 | (unsigned | 8 << 8 | 1 << 16) << 32, ctypes.addressof(shape)]
    words += [0, 0, 0, ctypes.cast(deleter, ctypes.c_void_p).value or 0]
    managed = (ctypes.c_uint64 * len(words))(*words)
    tensor = tensor_of(ctypes.addressof(managed))
    assert tensor.dtype == torch.uint8
    assert tensor.tolist() == list(range(64))
    view = tensor[5:]
    del tensor
    assert not freed
    del view
    assert len(freed) == 1
