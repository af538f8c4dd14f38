"""The AMX kernels: the emulation of the tile instructions, and every schedule of the products, also on hardware.

tests/cpu/test_instruction_sets.py runs the common shapes on `amx_bf16` and `amx_bf16_emulated`; this file has the
shapes that select between the AMX kernels' code paths.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
import torch

import qlora_kernels as qk
from python.build_support.cpu import AMX_FLAGS, COMMON_FLAGS
from python.build_support.native import CSRC, tool
from qlora_kernels.backends import cpu
from qlora_kernels.ops.operands import LoRA, weight_of
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from tests.cpu.instruction_sets import runs_here
from tests.support.linear_formulas import Dropout, arithmetic_of, assert_lora, linear, linear_grad_x
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within

if (reason := cpu.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)


SETS = [isa for isa in AMX_FLAGS if runs_here(isa)]
if not SETS:
    pytest.skip("neither AMX nor its emulation (AVX512-BF16) runs on this processor", allow_module_level=True)


@pytest.fixture(params=SETS)
def isa(request):
    cpu.instruction_set(request.param)
    with qk.use_backend("cpu"):
        yield request.param
    cpu.instruction_set("")


@pytest.mark.parametrize("name", AMX_FLAGS)
def test_tile_product_equals_the_scalar_model(name, tmp_path):
    program = tmp_path / "tile_check"
    sources = [
        str(Path(__file__).with_name("amx") / "tile_check.cpp"),
        *(str(CSRC / "cpu" / name) for name in ("amx/support.cpp", "processor.cpp")),
    ]
    command = [tool("CXX", "c++", "g++", "clang++"), *COMMON_FLAGS, *AMX_FLAGS[name], f"-DQLORA_ISA={name}"]
    command += [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cpu'}", *sources, "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


SCALING = 1.5

PROBLEMS = {
    "one tile of tokens": (16, 130, 320, 64, True),
    "two tiles, last block of one": (33, 96, 192, 64, True),
    "one chunk": (40, 64, 640, 64, False),
    "chunks and a last group of 64": (40, 64, 704, 64, True),
    "tokens divided among threads": (288, 96, 256, 64, True),
    "rows too long to be resident": (40, 64, 8320, 64, False),
    "groups of strips, several ranges of absmax": (40, 192, 8320, 64, True),
    "N not a multiple of 32": (20, 45, 256, 64, True),
    "K not a multiple of 64": (20, 64, 200, 64, True),
    "odd K": (5, 33, 97, 64, False),
    "blocks of 32": (20, 64, 256, 32, True),
    "blocks longer than rows": (20, 96, 192, 256, True),
    "blocks of 4096": (20, 64, 448, 4096, False),
    "one token": (1, 64, 256, 64, True),
}


def run(M, N, K, blocksize, double_quant, *, r, dropout_p, bias):
    """Run linear_nf4 and linear_nf4_lora forward and backward on one problem.

    Returns (y, grad_x) without LoRA, (y, s, grad_x, grad_A, grad_B) with LoRA, and the inputs.
    """
    packed, state = qk.quantize_nf4(gaussian(N, K, seed=1) / K**0.5, blocksize, double_quant=double_quant)
    bias = gaussian(N, seed=6) if bias else None
    grad_y = gaussian(M, N, dtype=torch.bfloat16, seed=3)
    plain_x = gaussian(M, K, dtype=torch.bfloat16).requires_grad_()
    plain_y = qk.linear_nf4(plain_x, packed, state, bias)
    plain_y.backward(grad_y)

    x = plain_x.detach().clone().requires_grad_()
    lora_A = (gaussian(r, K, seed=4) / K**0.5).requires_grad_()
    lora_B = gaussian(N, r, seed=5).requires_grad_()
    lora = LoRA(lora_A, lora_B, torch.tensor([987654321]), SCALING, dropout_p)
    y, s = torch.ops.qlora_kernels.linear_nf4_lora(x, *weight_of("test", packed, state), bias, *lora)
    y.backward(grad_y)
    w = qk.dequantize_nf4(packed, state, torch.bfloat16)
    inputs = (x, w, bias, lora_A, lora_B, grad_y)
    return (plain_y.detach(), plain_x.grad), (y.detach(), s, x.grad, lora_A.grad, lora_B.grad), inputs


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("r", "dropout_p", "bias"), [(4, 0.0, True), (40, 0.3, False)], ids=["r4", "r40 dropout"])
def test_linear_ops(isa, problem, r, dropout_p, bias):
    check(*PROBLEMS[problem], r=r, dropout_p=dropout_p, bias=bias)


@pytest.mark.parametrize("seed", range(40))
def test_linear_ops_on_random_problems(isa, seed):
    """Sizes around those of tiles, steps, groups and chunks, with every blocksize."""
    choose = random.Random(seed).choice
    M, N = choose([1, 2, 15, 17, 31, 33, 64, 100, 257]), choose([1, 2, 16, 31, 33, 63, 65, 130, 257])
    K = choose([1, 2, 31, 63, 64, 65, 128, 192, 257, 640, 641, 704, 832, 1088])
    blocksize, double_quant = choose([32, 64, 128, 256, 512, 1024, 2048, 4096]), choose([False, True])
    r, dropout_p = choose([1, 2, 7, 16, 17, 32, 33, 65]), choose([0.0, 0.1, 0.5])
    threads = torch.get_num_threads()
    torch.set_num_threads(choose([1, 2, 3]))
    try:
        check(M, N, K, blocksize, double_quant, r=r, dropout_p=dropout_p, bias=choose([False, True]))
    finally:
        torch.set_num_threads(threads)


def check(M, N, K, blocksize, double_quant, *, r, dropout_p, bias):
    """Compare all results of a problem with float64, within the bounds of the linear ops."""
    (y, grad_x), results, inputs = run(M, N, K, blocksize, double_quant, r=r, dropout_p=dropout_p, bias=bias)
    x, w, bias, _, _, grad_y = inputs
    arithmetic = arithmetic_of("cpu", torch.bfloat16)
    assert_within(y, linear(x, w, bias, arithmetic), "y without LoRA")
    assert_within(grad_x, linear_grad_x(grad_y, w, arithmetic), "grad_x without LoRA")
    keep = dropout_keep(torch.tensor([987654321]), *x.shape, dropout_p)
    dropout = Dropout(keep, keep_scale(dropout_p)) if dropout_p else None
    assert_lora(results, inputs, SCALING, dropout, arithmetic)


@pytest.mark.parametrize("problem", ["tokens divided among threads", "rows too long to be resident", "odd K"])
def test_thread_count_does_not_change_bits(isa, problem):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            plain, lora, _ = run(*PROBLEMS[problem], r=20, dropout_p=0.25, bias=True)
            results.append((*plain, *lora))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_run_on_avx512(isa, dtype):
    """x is not rounded to bf16: the bits equal those of avx512_bf16."""
    packed, state = qk.quantize_nf4(gaussian(96, 256, seed=1))
    x = gaussian(20, 256, dtype=dtype)
    y = qk.linear_nf4(x, packed, state)
    cpu.instruction_set("avx512_bf16")
    assert torch.equal(y, qk.linear_nf4(x, packed, state))


def test_emulation_is_never_chosen_automatically():
    assert cpu.instruction_set("") != "amx_bf16_emulated"
