"""Compiles the Triton kernels of the check for a GPU that is not present: `python -m bench.gpu_check.warm_cache 90`.

The comparison's calls run on CPU tensors under a driver that launches nothing, so that Triton's cache holds the kernels
of the comparison in bf16, and those that dispatch chooses for weights of 4096 x 4096.
"""

from __future__ import annotations

import os
import sys
from itertools import product

import torch

import qlora_kernels as qk
from python.kernels_report.mock_gpu import Compiled, compiling_for
from python.kernels_report.triton_rows import triton_rows
from qlora_kernels.backends.triton.planner import assume_capability
from qlora_kernels.ops.registry import kernels_of

from . import cases, compare


def compile_comparison(capability: int) -> list[Compiled]:
    """Run the comparison's cases in bf16 and the smoke step's; return the launches. Their results are not computed."""
    kernels = kernels_of("triton")
    # With this variable the backend accepts CPU tensors. Triton read it before, when the kernels were defined.
    os.environ["TRITON_INTERPRET"] = "1"
    with compiling_for(capability) as launches, assume_capability(capability), qk.use_backend("triton"):
        for name, M in product(cases.cases_of(list(kernels)), compare.ROWS):
            if name in compare.LINEARS or M in compare.FEW_ROWS:
                for p in (0.0, 0.1) if name == "lora" else (0.0,):
                    run, _ = cases.CASES[name]
                    run("cpu", torch.bfloat16, cases.Sizes(M, p=p))
        return launches


def main() -> int:
    """Fill the cache for the capability that the argument names, and print the number of kernels."""
    capability = int(sys.argv[1])
    rows = triton_rows([capability], full=False)  # before the interpreter's variable is set
    kernels = {launch.kernel.hash for launch in compile_comparison(capability)}
    sys.stdout.write(f"{len(rows)} kernels of default dispatch, {len(kernels)} of the comparison\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
