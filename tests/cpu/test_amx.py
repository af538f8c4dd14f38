"""The AMX kernels: the tile instructions' emulation, and every schedule of the products, on hardware or emulated.

tests/cpu/test_instruction_sets.py runs the common shapes on `amx_bf16` and `amx_bf16_emulated`; here are the shapes
that decide between the AMX kernels' own paths.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import qlora_kernels as qk
from python.build_support.cpu import AMX_FLAGS, COMMON_FLAGS
from python.build_support.native import CSRC, tool
from qlora_kernels.backends import cpu
from qlora_kernels.ops._philox import dropout_keep
from tests.support.problems import gaussian

if (reason := cpu.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)


def runs_here(isa):
    try:
        return cpu.instruction_set(isa) == isa
    except ValueError:
        return False
    finally:
        cpu.instruction_set("")


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
    sources = [str(Path(__file__).with_name("amx") / "tile_check.cpp"), str(CSRC / "cpu" / "amx" / "support.cpp")]
    command = [tool("CXX", "c++", "g++", "clang++"), *COMMON_FLAGS, *AMX_FLAGS[name], f"-DQLORA_ISA={name}"]
    command += [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cpu'}", *sources, "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


PROBLEMS = {
    "one tile of tokens": (16, 130, 320, 64, True),
    "two tiles, last block of one": (33, 96, 192, 64, True),
    "one chunk": (40, 64, 640, 64, False),
    "chunks and a last group of 64": (40, 64, 704, 64, True),
    "tokens divided among threads": (288, 96, 256, 64, True),
    "rows too long to be resident": (40, 64, 8320, 64, False),
    "N not a multiple of 32": (20, 45, 256, 64, True),
    "K not a multiple of 64": (20, 64, 200, 64, True),
    "odd K": (5, 33, 97, 64, False),
    "blocks of 32": (20, 64, 256, 32, True),
    "blocks longer than rows": (20, 96, 192, 256, True),
    "blocks of 4096": (20, 64, 448, 4096, False),
    "one token": (1, 64, 256, 64, True),
}


def run(M, N, K, blocksize, double_quant, *, r, dropout_p, bias):
    """(results of linear_nf4, linear_nf4_lora and their gradients, the same in float64, bounds by element)."""
    packed, state = qk.quantize_nf4(gaussian(N, K, seed=1) / K**0.5, blocksize, double_quant=double_quant)
    w = qk.dequantize_nf4(packed, state, torch.bfloat16).double()
    x, grad_y = gaussian(M, K, dtype=torch.bfloat16), gaussian(M, N, dtype=torch.bfloat16, seed=3)
    a, b = gaussian(r, K, seed=4) / K**0.5, gaussian(N, r, seed=5)
    bias = gaussian(N, seed=6) if bias else None
    seed, scaling = torch.tensor([987654321]), 1.5
    leaves = [x.clone().requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
    plain_x = x.clone().requires_grad_()
    plain = qk.linear_nf4(plain_x, packed, state, bias)
    plain.backward(grad_y)
    y = qk.linear_nf4_lora(
        leaves[0], packed, state, leaves[1], leaves[2], bias, scaling=scaling, dropout_p=dropout_p, seed=seed
    )
    y.backward(grad_y)
    ours = [plain.detach(), plain_x.grad, y.detach(), *(leaf.grad for leaf in leaves)]

    # The roundings of the kernel's own definition: factors, s and ds in bf16; every sum exact.
    X, G = x.double(), grad_y.double()
    A, B, B_scaled = (t.bfloat16().double() for t in (a, b, scaling * b))
    keep = dropout_keep(seed, M, K, dropout_p).double() if dropout_p else torch.ones(M, K, dtype=torch.float64)
    factor = 65536 / (65536 - round(dropout_p * 65536))
    s = (factor * ((keep * X) @ A.T)).bfloat16().double()
    ds = (scaling * (G @ B)).bfloat16().double()
    base = X @ w.T + (0 if bias is None else bias.double())
    exact = [
        base,
        G @ w,
        base + s @ B_scaled.T,
        G @ w + keep * factor * (ds @ A),
        factor * (ds.T @ (keep * X)),
        scaling * (G.T @ s),
    ]
    # A sum of n products accumulated in fp32 errs by at most n u times the sum of the products' magnitudes. Our s and
    # ds may be neighbours of these in bf16, where the rounded sums lie close to the middle between two numbers.
    u, bf16 = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps
    low_rank, low_rank_grad = s.abs() @ B_scaled.abs().T, factor * (ds.abs() @ A.abs())
    magnitudes = [
        u * (K + 1) * (X.abs() @ w.abs().T),
        u * N * (G.abs() @ w.abs()),
        u * (K + r) * (X.abs() @ w.abs().T + low_rank) + bf16 * low_rank,
        u * (N + r) * (G.abs() @ w.abs() + low_rank_grad) + bf16 * low_rank_grad,
        (u * M + bf16) * factor * (ds.abs().T @ X.abs()),
        (u * M + bf16) * scaling * (G.abs().T @ s.abs()),
    ]
    bounds = []
    for magnitude, e, result in zip(magnitudes, exact, ours, strict=True):
        half_ulp = torch.finfo(result.dtype).eps / 2
        bounds.append(magnitude + half_ulp * (e.abs() + magnitude))
    return ours, exact, bounds


NAMES = ("y", "grad_x", "y with LoRA", "grad_x with LoRA", "grad_A", "grad_B")


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("r", "dropout_p", "bias"), [(4, 0.0, True), (40, 0.3, False)], ids=["r4", "r40 dropout"])
def test_linear_ops(isa, problem, r, dropout_p, bias):
    ours, exact, bounds = run(*PROBLEMS[problem], r=r, dropout_p=dropout_p, bias=bias)
    for name, result, expected, bound in zip(NAMES, ours, exact, bounds, strict=True):
        error = (result.double() - expected).abs()
        assert (error <= bound).all(), f"{name}: error is up to {(error / bound).max():.3g} times its bound"


@pytest.mark.parametrize("problem", ["tokens divided among threads", "rows too long to be resident", "odd K"])
def test_bits_do_not_depend_on_the_number_of_threads(isa, problem):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(*PROBLEMS[problem], r=20, dropout_p=0.25, bias=True)[0])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_run_on_avx512(isa, dtype):
    """x is not rounded to bf16: the bits are those of avx512_bf16."""
    packed, state = qk.quantize_nf4(gaussian(96, 256, seed=1))
    x = gaussian(20, 256, dtype=dtype)
    y = qk.linear_nf4(x, packed, state)
    cpu.instruction_set("avx512_bf16")
    assert torch.equal(y, qk.linear_nf4(x, packed, state))


def test_emulation_is_never_chosen_automatically():
    assert cpu.instruction_set("") != "amx_bf16_emulated"
