"""Compare step: every op of one backend against the reference on the CPU, over dtypes, rows, dropout and groups.

The codec is compared bit for bit. Products are compared by the largest difference over the largest value: both
sides sum in another order and round a few times. tests/gpu has the exact bounds, for machines with pytest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels.ops.operands import LoRA, weight_of

from . import rows as rows_module
from .rows import Rows, step_arguments

TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-16}
"""Several roundings of the dtype, relative to the largest value of the result."""

ROWS = (1, 2, 4, 5, 16, 17, 33, 64, 65, 257)
N, K, R = 520, 1024, 16


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values from a seed, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_codec(rows: Rows, backend: str, dtype: torch.dtype, numel: int, double: bool) -> bool:
    """Quantize and dequantize on the GPU; the CPU's reference must have the same bytes. absmax_offset, a mean, may
    differ in its last bits and is taken from the GPU.
    """
    w = gaussian(numel, seed=1, dtype=dtype)
    with qk.use_backend(backend):
        packed, state = qk.quantize_nf4(w.to(rows_module.DEVICE), 64, double)
        result = qk.dequantize_nf4(packed, state, dtype).cpu()
    on_host = state.to("cpu")
    with qk.use_backend("reference"):
        expected_packed, _ = qk.quantize_nf4(w, 64, double)
        expected = qk.dequantize_nf4(packed.cpu(), on_host, dtype)
    ok = torch.equal(packed.cpu().reshape(-1), expected_packed.reshape(-1)) and torch.equal(result, expected)
    rows.add(backend=backend, op="codec", dtype=str(dtype), numel=numel, double=double, ok=ok)
    return ok


def lora_results(device: str, dtype: torch.dtype, sizes: tuple[int, int, int], p: float) -> Sequence[Tensor]:
    """y and all gradients of one LoRA linear, on `device`."""
    M, n, k = sizes
    with qk.use_backend("reference"):
        packed, state = qk.quantize_nf4(gaussian(n, k, seed=2) / k**0.5)
    packed, state = packed.to(device), state.to(device)
    leaves = [
        gaussian(M, k, seed=3, dtype=dtype),
        (gaussian(R, k, seed=4) / k**0.5).to(dtype).float(),
        gaussian(n, R, seed=5).to(dtype).float(),
        gaussian(n, seed=6, dtype=dtype),
    ]
    x, A, B, bias = (leaf.to(device).requires_grad_() for leaf in leaves)
    lora = LoRA(A, B, torch.tensor([7], device=device), 0.5, p)
    y, _ = torch.ops.qlora_kernels.linear_nf4_lora(x, *weight_of("gpu_check", packed, state), bias, *lora)
    grad_y = gaussian(M, n, seed=8, dtype=dtype).to(device)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B, bias), grad_y)]


def check_case(rows: Rows, backend: str, dtype: torch.dtype, M: int, n: int, k: int, p: float) -> bool:
    """One LoRA linear, forward and backward, against the reference on the CPU; and its repetition, bit for bit."""
    with qk.use_backend(backend):
        results = [t.cpu() for t in lora_results(rows_module.DEVICE, dtype, (M, n, k), p)]
        again = [t.cpu() for t in lora_results(rows_module.DEVICE, dtype, (M, n, k), p)]
    with qk.use_backend("reference"):
        expected = lora_results("cpu", dtype, (M, n, k), p)
    errors = {
        name: ((a.double() - e.double()).abs().max() / e.double().abs().max()).item()
        for name, a, e in zip(("y", "x", "A", "B", "bias"), results, expected, strict=True)
    }
    repeats = all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    ok = repeats and all(error <= TOLERANCE[dtype] for error in errors.values())
    fields = {"op": "linear_nf4_lora", "dtype": str(dtype), "M": M, "N": n, "K": k, "dropout": p}
    rows.add(backend=backend, **fields, errors=errors, repeats=repeats, ok=ok)
    return ok


def main() -> int:
    """Run the step; 1 if any result is wrong."""
    arguments = step_arguments(__doc__)
    rows, ok = Rows(arguments.out, "compare"), True
    dtypes = (torch.bfloat16,) if arguments.tiny else (torch.bfloat16, torch.float16, torch.float32)
    n, k = (24, 64) if arguments.tiny else (N, K)
    for dtype in dtypes:
        for double in (True, False):
            ok &= check_codec(rows, arguments.backend, dtype, 4096 if arguments.tiny else 2**20 + 7, double)
        if arguments.tiny and arguments.backend == "triton":
            continue
        for M in (2, 5) if arguments.tiny else ROWS:
            for p in (0.0, 0.1):
                ok &= check_case(rows, arguments.backend, dtype, M, n, k, p)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
