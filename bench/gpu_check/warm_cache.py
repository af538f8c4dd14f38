"""Compiles the Triton kernels of the check for a GPU that is not present: `python -m bench.gpu_check.warm_cache 90`.

The comparison's calls run on CPU tensors under a driver that launches nothing; the launchers of the other steps take
tensors without memory. Triton's cache then holds the kernels of every step, in every dtype. --tiny: of a rehearsal.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable

import torch

import qlora_kernels as qk
from python.kernels_report.mock_gpu import Compiled, compiling_for
from python.kernels_report.triton_rows import meta
from qlora_kernels.backends.triton.dequantize_nf4 import dequantize_nf4
from qlora_kernels.backends.triton.linear_nf4 import linear_nf4, linear_nf4_grad_x
from qlora_kernels.backends.triton.linear_nf4_lora import linear_nf4_lora, linear_nf4_lora_backward
from qlora_kernels.backends.triton.planner import assume_capability
from qlora_kernels.backends.triton.quantize_absmax import quantize_absmax
from qlora_kernels.backends.triton.quantize_nf4 import quantize_nf4
from qlora_kernels.ops.operands import LoRA, Needs, Weight
from qlora_kernels.ops.registry import Problem

from . import cases, compare, host_time, kernel_times, smoke, training

BLOCKSIZE = 64


def compile_comparison(capability: int, tiny: bool) -> list[Compiled]:
    """Run the calls of the comparison and of the smoke step; return the launches. Their results are not computed."""
    # With this variable the backend accepts CPU tensors. Triton read it before, when the kernels were defined.
    os.environ["TRITON_INTERPRET"] = "1"
    with compiling_for(capability) as launches, assume_capability(capability), qk.use_backend("triton"):
        smoke_step = (smoke.CASE, torch.bfloat16, smoke.sizes(tiny))
        for name, dtype, sizes in (smoke_step, *compare.comparisons("triton", tiny)):
            run, _ = cases.CASES[name]
            run("cpu", dtype, sizes)
        return launches


def compile_measurements(capability: int, tiny: bool) -> list[Compiled]:
    """Call the launchers of the codec and of the measuring steps; return the launches."""
    sizes = training.TINY if tiny else training.Sizes()
    with compiling_for(capability) as launches, assume_capability(capability):
        for dtype, numel, double in (smoke.CODEC, *compare.codecs(tiny)):
            compile_codec(dtype, numel, double)
        for N, K in {*kernel_times.shapes(tiny), *host_time.shapes(tiny), *sizes.weights}:
            compile_codec(torch.bfloat16, N * K, double=True)
        for N, K in kernel_times.shapes(tiny):
            for M in kernel_times.row_counts(tiny):
                problem = Problem("linear_nf4", "cuda", torch.bfloat16, M, N, K, 0, BLOCKSIZE, True)
                for _, forced in kernel_times.paths(problem, "triton", capability, kernel_times.best_plans(tiny)):
                    with forced:
                        linear_nf4(meta(M, K, dtype=torch.bfloat16), weight(N, K), None)
        for N, K in host_time.shapes(tiny):
            for M in host_time.row_counts(tiny):
                compile_linear(M, N, K, (0.0,))
        for N, K in sizes.weights:
            compile_linear(sizes.tokens, N, K, training.DROPOUT)
        return launches


def compile_codec(dtype: torch.dtype, numel: int, double: bool) -> None:
    """Call the launchers of the codec, without the op's check that weights are finite: there are no values."""
    quantize_nf4(meta(numel, dtype=dtype), blocksize=BLOCKSIZE)
    if double:
        quantize_absmax(meta(-(-numel // BLOCKSIZE)))
    dequantize_nf4(weight(1, numel, double), out=meta(numel, dtype=dtype))


def compile_linear(M: int, N: int, K: int, dropout: Iterable[float], r: int = training.R) -> None:
    """Call forward and backward of a linear, and of a LoRA linear with fp32 factors for each probability of dropout."""
    w = weight(N, K)
    x, grad_y, s = (meta(M, columns, dtype=torch.bfloat16) for columns in (K, N, r))
    linear_nf4(x, w, None)
    linear_nf4_grad_x(grad_y, w)
    for p in dropout:
        lora = LoRA(meta(r, K), meta(N, r), meta(1, dtype=torch.int64) if p else None, training.SCALING, p)
        linear_nf4_lora(x, w, None, lora)
        linear_nf4_lora_backward(grad_y, x, s, w, lora, Needs())


def weight(N: int, K: int, double: bool = True) -> Weight:
    """Return a weight without memory. double: whether it is double-quantized."""
    packed, blocks = meta((N * K + 1) // 2, dtype=torch.uint8), -(-N * K // BLOCKSIZE)
    if not double:
        return Weight(packed, meta(blocks), None, None, None, BLOCKSIZE, N, K)
    nested = meta(blocks, dtype=torch.uint8), meta(-(-blocks // 256)), meta()
    return Weight(packed, None, *nested, BLOCKSIZE, N, K)


def main() -> int:
    """Fill the cache for the capability that the argument names, and print the number of kernels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("capability", type=int)
    parser.add_argument("--tiny", action="store_true", help="the kernels of a rehearsal")
    arguments = parser.parse_args()
    measured = {launch.kernel.hash for launch in compile_measurements(arguments.capability, arguments.tiny)}
    compared = {launch.kernel.hash for launch in compile_comparison(arguments.capability, arguments.tiny)}
    sys.stdout.write(f"{len(compared)} kernels of the comparison, {len(measured - compared)} more of the other steps\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
