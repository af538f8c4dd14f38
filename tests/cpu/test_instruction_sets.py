"""Every instruction set of this machine, forced in turn: equal bytes of the codec, bounded errors of the other ops.

tests/ops runs the cpu backend on its best set; this file runs the shapes that select between code paths on all sets.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.backends import cpu
from qlora_kernels.format import nf4, reference
from qlora_kernels.ops.operands import LoRA, weight_of
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.cpu.instruction_sets import SETS
from tests.support import attention_formula, cross_entropy_formula, lora_group_checks, multi_lora_checks
from tests.support.linear_formulas import Dropout, arithmetic_of, assert_lora, linear, linear_grad_x
from tests.support.problems import DTYPES, SHAPES, Shape, dtype_name, gaussian
from tests.support.tolerances import assert_within

if (reason := cpu.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

ROOT = Path(__file__).parents[2]
PATHS = (
    *SHAPES,
    Shape(8, 64, 128),  # few tokens, whole blocks
    Shape(8, 40, 192, blocksize=32),
    Shape(13, 256, 128, r=20, blocksize=128),  # a rank of more than one vector
    Shape(25, 96, 64, r=64),
    Shape(2, 130, 4160, r=3),
    Shape(10, 41, 2112),  # several pieces of K, partial tiles of rows and tokens
)
shapes = pytest.mark.parametrize("shape", [s for s in PATHS if s.M], ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@pytest.fixture(params=SETS)
def isa(request):
    cpu.instruction_set(request.param)
    with qk.use_backend("cpu"):
        yield request.param
    cpu.instruction_set("")


@dtypes
@pytest.mark.parametrize(("numel", "blocksize"), [(1, 64), (31, 32), (65, 64), (4096, 4096), (100003, 64)])
def test_codec_bytes(isa, dtype, numel, blocksize):
    w = gaussian(numel, dtype=dtype) * 3
    packed, state = qk.quantize_nf4(w, blocksize, double_quant=False)
    expected, absmax = reference.quantize_nf4(w, blocksize)
    assert torch.equal(packed.view(-1), expected)
    assert torch.equal(state.absmax, absmax)
    for out_dtype in DTYPES:
        out = torch.full((numel + 32,), float("nan"), dtype=out_dtype)
        qk.dequantize_nf4(packed, state, out=out[:numel])
        assert torch.equal(out[:numel], reference.dequantize_nf4(expected, absmax, blocksize, (numel,), out_dtype))
        assert out[numel:].isnan().all(), "wrote past the end"


def test_every_boundary(isa):
    """Each decision boundary, one ulp below, on, and one above it."""
    b = nf4.boundaries()
    inf = torch.full_like(b, float("inf"))
    values = torch.stack([b, torch.nextafter(b, -inf), torch.nextafter(b, inf)]).reshape(-1)
    w = torch.cat([torch.ones(1), values, torch.zeros(64 - 1 - values.numel())])
    packed, _ = qk.quantize_nf4(w, double_quant=False)
    assert torch.equal(packed.view(-1), reference.quantize_nf4(w, 64)[0])


def test_subnormal_results_are_exact(isa):
    """Subnormal results are neither flushed nor rounded twice."""
    w = gaussian(4096) * 2.0**-125
    packed, state = qk.quantize_nf4(w, double_quant=False)
    for dtype in DTYPES:
        expected = reference.dequantize_nf4(packed.view(-1), state.absmax, 64, (4096,), dtype)
        assert torch.equal(qk.dequantize_nf4(packed, state, dtype), expected)


def test_ties_are_rounded_to_even(isa):
    """The products of codes 1 and -1 with these absmax lie halfway between two bf16, or two fp16."""
    absmax = torch.tensor([1 + step * 2.0**-bits for bits in (8, 11) for step in (1, 3)])
    packed = torch.tensor([0x0F], dtype=torch.uint8).repeat(4 * 32)
    state = qk.QuantState(torch.Size((256,)), torch.float32, 64, absmax=absmax)
    for dtype in DTYPES:
        expected = (torch.tensor([-1.0, 1.0]).repeat(32) * absmax[:, None]).to(dtype).flatten()
        assert torch.equal(qk.dequantize_nf4(packed, state, dtype), expected)


@dtypes
@shapes
def test_linear(isa, dtype, shape):
    packed, state = qk.quantize_nf4(gaussian(shape.N, shape.K, seed=1) / shape.K**0.5, shape.blocksize)
    x = gaussian(shape.M, shape.K, dtype=dtype).requires_grad_()
    grad_y = gaussian(shape.M, shape.N, dtype=dtype, seed=3)
    y = qk.linear_nf4(x, packed, state)
    y.backward(grad_y)
    w, arithmetic = qk.dequantize_nf4(packed, state, dtype), arithmetic_of("cpu", dtype)
    assert_within(y, linear(x, w, None, arithmetic), "y")
    assert_within(x.grad, linear_grad_x(grad_y, w, arithmetic), "grad_x")


@dtypes
@shapes
def test_linear_lora(isa, dtype, shape):
    """Forward and the three gradients, with unrounded masters of the factors and a scaling that is not a power of
    two."""
    packed, state = qk.quantize_nf4(gaussian(shape.N, shape.K, seed=1) / shape.K**0.5, shape.blocksize)
    x = gaussian(shape.M, shape.K, dtype=dtype).requires_grad_()
    lora_A = (gaussian(shape.r, shape.K, seed=4) / shape.K**0.5).requires_grad_()
    lora_B = gaussian(shape.N, shape.r, seed=5).requires_grad_()
    grad_y, seed = gaussian(shape.M, shape.N, dtype=dtype, seed=3), torch.tensor([123456789012345])
    scaling, p = 1.7, 0.3 if shape.N % 2 == 0 else 0.0
    lora = LoRA(lora_A, lora_B, seed, scaling, p)
    y, s = torch.ops.qlora_kernels.linear_nf4_lora(x, *weight_of("test", packed, state), None, *lora)
    y.backward(grad_y)

    w, arithmetic = qk.dequantize_nf4(packed, state, dtype), arithmetic_of("cpu", dtype)
    dropout = Dropout(dropout_keep(seed, shape.M, shape.K, p), keep_scale(p)) if p else None
    results = (y, s, x.grad, lora_A.grad, lora_B.grad)
    assert_lora(results, (x, w, None, lora_A, lora_B, grad_y), scaling, dropout, arithmetic)


@dtypes
@pytest.mark.parametrize(("M", "N", "K"), [(5, 33, 97), (20, 45, 200), (40, 64, 128)])
def test_nonfinite_token_affects_only_its_row(isa, dtype, M, N, K):
    """Padding is neither the next token nor what an earlier call left in scratch memory: 0 * NaN would show it."""
    packed, state = qk.quantize_nf4(gaussian(N, K, seed=1) / K**0.5)
    lora_A, lora_B = gaussian(4, K, seed=4), gaussian(N, 4, seed=5)

    def run(x, grad_y):
        x = x.clone().requires_grad_()
        y = qk.linear_nf4_lora(x, packed, state, lora_A, lora_B, scaling=1.5)
        return y.detach(), torch.autograd.grad(y, x, grad_y)[0]

    x, grad_y = gaussian(M, K, dtype=dtype), gaussian(M, N, dtype=dtype, seed=3)
    spoiled_x, spoiled_grad_y, bad = x.clone(), grad_y.clone(), M // 2
    spoiled_x[bad] = spoiled_grad_y[bad] = float("nan")
    clean, spoiled, again = run(x, grad_y), run(spoiled_x, spoiled_grad_y), run(x, grad_y)
    for before, during, after in zip(clean, spoiled, again, strict=True):
        assert during[bad].isnan().all()
        during[bad] = before[bad]
        assert torch.equal(before, during)
        assert torch.equal(before, after)


@dtypes
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("M", "K", "widths", "ranks"), lora_group_checks.SHAPES)
def test_linear_lora_group(isa, dtype, M, K, widths, ranks, p):
    lora_group_checks.check_forward_and_gradients("cpu", dtype, M, K, widths, ranks, p)


@dtypes
@pytest.mark.parametrize("shape", [Shape(19, 130, 257, r=8), Shape(40, 96, 128, r=16)], ids=str)
def test_linear_multi_lora(isa, dtype, shape):
    multi_lora_checks.check_forward_and_gradients("cpu", dtype, shape, 0.3)


@pytest.mark.parametrize(("N", "K"), [(200, 320), (544, 2112)], ids=["one panel", "several panels"])
def test_threads_do_not_change_the_bits(isa, N, K):
    """The bits of y and grad_x, with one and with several panels per thread, do not depend on the threads."""
    packed, state = qk.quantize_nf4(gaussian(N, K, seed=1))
    x = gaussian(77, K, dtype=torch.bfloat16).requires_grad_()
    grad_y = gaussian(77, N, dtype=torch.bfloat16, seed=3)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y = qk.linear_nf4(x, packed, state)
            results.append((y.detach(), *torch.autograd.grad(y, x, grad_y)))
    finally:
        torch.set_num_threads(threads)
    for y, grad_x in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad_x, results[0][1])


@dtypes
@pytest.mark.parametrize(("M", "V", "K", "softcap"), [(1, 5, 3, None), (270, 300, 65, 4.0), (35, 700, 96, None)])
def test_linear_cross_entropy(isa, dtype, M, V, K, softcap):
    hidden = gaussian(M, K, dtype=dtype).requires_grad_()
    weight, bias = (2 * gaussian(V, K, seed=1) / K**0.5).to(torch.bfloat16), gaussian(V, seed=3)
    labels = torch.arange(M) * 7 % V
    labels[2::3] = -100
    losses = qk.linear_cross_entropy(hidden, weight, labels, bias, softcap=softcap, reduction="none")
    losses.sum().backward()
    expected = cross_entropy_formula.linear_cross_entropy(hidden, weight, labels, bias, softcap=softcap)
    assert_within(losses, expected.losses, "losses")
    assert_within(hidden.grad, expected.rows, "grad_hidden")


def test_softcap_of_large_scores(isa):
    """The exponentials inside tanh would overflow without a bound."""
    hidden, weight = 40 * gaussian(3, 16), gaussian(40, 16, seed=1)
    losses = qk.linear_cross_entropy(hidden.requires_grad_(), weight, torch.arange(3), softcap=4.0, reduction="none")
    losses.sum().backward()
    expected = cross_entropy_formula.linear_cross_entropy(hidden, weight, torch.arange(3), None, softcap=4.0)
    assert_within(losses, expected.losses, "losses")
    assert_within(hidden.grad, expected.rows, "grad_hidden")


@dtypes
@pytest.mark.parametrize("D", [80])
def test_attention(isa, dtype, D):
    """Grouped heads, two blocks of tokens, documents that end inside a block, and a softcap."""
    q, k, v, grad_out = (gaussian(1, n, 110, D, dtype=dtype, seed=n) for n in (4, 2, 1, 5))
    q, k, v, grad_out = q, k, torch.cat([v, -v], dim=1), grad_out[:, :4]
    tensors = [t.requires_grad_() for t in (q, k, v)]
    documents = (torch.arange(110) // 40)[None]
    out = qk.attention(*tensors, documents=documents, softcap=4.0)
    gradients = torch.autograd.grad(out, tensors, grad_out)
    visible = (documents[:, :, None] == documents[:, None, :]).tril()
    expected = attention_formula.attention(*(t.detach() for t in tensors), grad_out, visible, softcap=4.0)
    wanted = (expected.out, expected.grad_q, expected.grad_k, expected.grad_v)
    for name, actual, want in zip(("out", "grad_q", "grad_k", "grad_v"), (out, *gradients), wanted, strict=True):
        assert_within(actual, want, name)


def test_thread_count_does_not_change_bits_of_attention(isa):
    q, k, v, grad_out = (gaussian(2, n, 100, 16, dtype=torch.bfloat16, seed=n) for n in (4, 2, 2, 4))
    tensors = [t.requires_grad_() for t in (q, k, v)]
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            out = qk.attention(*tensors)
            results.append((out.detach(), *torch.autograd.grad(out, tensors, grad_out)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_thread_count_does_not_change_bits_of_loss(isa):
    hidden = gaussian(300, 64, dtype=torch.bfloat16).requires_grad_()
    weight, labels = gaussian(900, 64, dtype=torch.bfloat16, seed=1) / 8, torch.arange(300)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            losses = qk.linear_cross_entropy(hidden, weight, labels, reduction="none")
            results.append((losses.detach(), *torch.autograd.grad(losses.sum(), hidden)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], other, strict=True))


def test_wrong_environment_value():
    """The message lists the instruction sets of this family of processors."""
    of_x86 = "amx_bf16, avx512_bf16_fma, avx512_bf16, avx512, avx2"
    family = {"x86_64": f"{of_x86} or ", "AMD64": f"{of_x86} or ", "aarch64": "neon or ", "arm64": "neon or "}
    code = "import torch, qlora_kernels as qk; qk.quantize_nf4(torch.ones(64))"
    environment = {**os.environ, "QLORA_CPU_ISA": "sse9"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    expected = f"QLORA_CPU_ISA must be {family.get(platform.machine(), '')}portable, got sse9"
    assert expected in done.stderr
