"""Compare step: every op of one backend against the reference on the CPU, over dtypes, rows and dropout.

The codec is compared bit for bit. Products are compared by the largest difference over the largest value: both
sides sum in another order and round a few times. tests/gpu has the exact bounds, for machines with pytest. Each path of
the cuda backend is also forced, because the default choice on one GPU leaves some of them out. With --path NAME, that
path alone is compared.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

import qlora_kernels as qk
from qlora_kernels.backends.cuda import routing
from qlora_kernels.backends.triton import planner
from qlora_kernels.ops.registry import Problem, kernels_of

from . import rows as rows_module
from .cases import CASES, TINY_SIZES, Sizes, cases_of, gaussian
from .forced_paths import forced_paths
from .rows import Rows, step_arguments

TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-16}
"""Several roundings of the dtype, relative to the largest value of the result."""

LINEARS = ("linear", "lora")
"""Cases that are compared for all numbers of rows in ROWS."""

ROWS = (1, 2, 4, 5, 16, 17, 33, 64, 65, 257)
"""Numbers of rows of x for the linears; the choice of kernel changes between some of them."""

FEW_ROWS = (5, 257)
"""Number of rows of x for the other ops."""

FORCED = ("lora", "group", "merged_lora")
"""Cases that are compared for each path of the cuda backend."""

FORCED_ROWS = (1, 8, 16, 24, 48, 96, 257)
"""Numbers of rows of x for these: every tile of the pair-table and of the wgmma kernel, and rows for which the default
decodes the weight first."""

TINY_FORCED = Sizes(16, 64, 256)
"""Sizes of a rehearsal of these: K of one group of the pair-table kernel."""

TINY_TRITON = ("lora",)
"""Cases of a rehearsal of Triton, few because the fake device takes seconds to compile each kernel."""


def check_codec(rows: Rows, backend: str, dtype: torch.dtype, numel: int, double: bool) -> bool:
    """Check that quantizing and dequantizing on the GPU gives the bytes of the CPU's reference.

    absmax_offset is a mean that may differ in its last bits, so it is taken from the GPU.
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


def check_case(rows: Rows, backend: str, name: str, dtype: torch.dtype, sizes: Sizes, path: str | None = None) -> bool:
    """Compare one case with the reference on the CPU, and with its repetition bit for bit. path: the one that is
    forced, for the row.
    """
    run, _ = CASES[name]
    with qk.use_backend(backend):
        results = [t.cpu() for t in run(rows_module.DEVICE, dtype, sizes)]
        again = [t.cpu() for t in run(rows_module.DEVICE, dtype, sizes)]
    with qk.use_backend("reference"):
        expected = run("cpu", dtype, sizes)
    errors = [
        ((a.double() - e.double()).abs().max() / e.double().abs().max()).item()
        for a, e in zip(results, expected, strict=True)
    ]
    repeats = all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    ok = repeats and all(error <= TOLERANCE[dtype] for error in errors)
    fields = {"op": name, "dtype": str(dtype), "M": sizes.M, "N": sizes.N, "K": sizes.K, "dropout": sizes.p}
    fields |= {} if path is None else {"path": path}
    rows.add(backend=backend, **fields, errors=errors, repeats=repeats, ok=ok)
    return ok


def check_forced_paths(rows: Rows, sizes: Sizes, only: str) -> bool:
    """Compare the cases of FORCED for the paths of the cuda backend that serve a linear of these sizes.

    only: the path that is compared; "" for all but those of routing.ON_REQUEST.
    """
    problem = Problem("linear_nf4", "cuda", torch.bfloat16, sizes.M, sizes.N, sizes.K, 0, 64, True)
    ok = True
    capability = planner.capability_of(torch.device("cuda", torch.cuda.current_device()))
    for path in forced_paths(problem, capability, only):
        with routing.use_path(path):
            for name in FORCED:
                ok &= check_case(rows, "cuda", name, torch.bfloat16, sizes, path)
    return ok


def codecs(tiny: bool) -> list[tuple[torch.dtype, int, bool]]:
    """Return (dtype, elements, double quantization) of each comparison of the codec."""
    if tiny:
        return [(torch.bfloat16, 4096, True)]
    return [(dtype, 2**20 + 7, double) for dtype in TOLERANCE for double in (True, False)]


def comparisons(backend: str, tiny: bool) -> Iterator[tuple[str, torch.dtype, Sizes]]:
    """Yield (case, dtype, sizes) of each comparison under the backend's own choice of kernels."""
    for dtype in (torch.bfloat16,) if tiny else TOLERANCE:
        for name in cases_of(list(kernels_of(backend))):
            if tiny:
                if backend != "triton" or name in TINY_TRITON:
                    yield name, dtype, TINY_SIZES
                continue
            for M in ROWS if name in LINEARS else FEW_ROWS:
                for p in (0.0, 0.1) if name == "lora" else (0.0,):
                    yield name, dtype, Sizes(M, p=p)


def main() -> int:
    """Run the step; 1 if any result is wrong."""
    arguments = step_arguments(__doc__)
    rows, backend, ok = Rows(arguments.out, "compare"), arguments.backend, True
    if not arguments.path:
        for codec in codecs(arguments.tiny):
            ok &= check_codec(rows, backend, *codec)
        for comparison in comparisons(backend, arguments.tiny):
            ok &= check_case(rows, backend, *comparison)
    if backend == "cuda":
        for sizes in (TINY_FORCED,) if arguments.tiny else (Sizes(M) for M in FORCED_ROWS):
            ok &= check_forced_paths(rows, sizes, arguments.path)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
