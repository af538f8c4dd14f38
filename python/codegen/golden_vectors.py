"""Writes tests/golden/nf4.safetensors: small weights and their quantized forms by bitsandbytes 0.50.2 on a CPU.

    python -m python.codegen.golden_vectors            write the file
    python -m python.codegen.golden_vectors --check    compare a fresh run with it

For each case `<c>`: `<c>/w` the weight, flat; `<c>/packed`, `<c>/absmax` without double quantization; `<c>/absmax_q`,
`<c>/absmax_scale`, `<c>/absmax_offset` with it; `<c>/dequantized/<dtype>` of the double-quantized bytes. Metadata holds
each case's blocksize. Weights are one-dimensional because bitsandbytes' CPU dequantization misreads matrices whose rows
are not a multiple of the blocksize (docs/format.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_kernels.format import double_quant, nf4

VERSION = "0.50.2"
PATH = Path(__file__).parents[2] / "tests" / "golden" / "nf4.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weights() -> dict[str, tuple[Tensor, int]]:
    """Return case name -> (flat weight, blocksize)."""
    generator = torch.Generator().manual_seed(20230523)
    normal = torch.randn(8192, generator=generator)
    cases = {f"normal-{name}": (normal[:4096].to(dtype), 64) for name, dtype in DTYPES.items()}
    cases |= {f"blocksize-{size}": (normal[: 2 * size].bfloat16(), size) for size in nf4.BLOCKSIZES}
    cases["coarse-absmax"] = (_where_its_lookup_is_coarse(generator), 32)
    cases["heavy-tailed"] = (normal[:2048] ** 5, 64)
    cases["odd-tail"] = (normal[:1027].clone(), 64)
    cases["one"] = (torch.tensor([-0.3]), 64)
    cases["zero-block"] = (torch.cat([torch.zeros(64), normal[:64], torch.zeros(3)]), 64)
    cases["boundaries"] = (_around_boundaries(), 64)
    cases["tail-division"] = (_where_division_differs(generator), 64)
    return cases


def _around_boundaries() -> Tensor:
    """Return each decision boundary at -1, 0 and +1 ulp, in a block whose absmax is one."""
    middles = nf4.boundaries()
    below = torch.nextafter(middles, torch.full_like(middles, -torch.inf))
    above = torch.nextafter(middles, torch.full_like(middles, torch.inf))
    return torch.cat([below, middles, above, torch.zeros(18), torch.ones(1)])


def _where_division_differs(generator: torch.Generator) -> Tensor:
    """Return a short block in which w / absmax and w * (1 / absmax) are on two sides of a boundary."""
    absmax = torch.rand(100_000, generator=generator) + 0.5
    middles = nf4.boundaries()
    for boundary in middles:
        w = boundary * absmax
        quotient, product = (torch.bucketize(n, middles) for n in (w / absmax, w * (1 / absmax)))
        differs = (quotient != product).nonzero().flatten()
        if differs.numel():
            i = differs[0]
            return torch.stack([absmax[i], w[i], torch.zeros(())])
    raise RuntimeError("no example found")


def _where_its_lookup_is_coarse(generator: torch.Generator) -> Tensor:
    """Return 256 blocks of which at least one 8-bit code is not the nearest in bitsandbytes' CPU path."""
    for _ in range(200):
        w = (torch.randn(256 * 32, generator=generator) * 0.02).bfloat16()
        nested = bnb.quantize_4bit(w, blocksize=32, quant_type="nf4", compress_statistics=True)[1]
        absmax = w.float().view(256, 32).abs().amax(1)
        if not torch.equal(double_quant.quantize_absmax(absmax)[0], nested.absmax):
            return w
    raise RuntimeError("no example found")


def vectors() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors and the metadata of the file."""
    tensors: dict[str, Tensor] = {}
    metadata = {"bitsandbytes": VERSION}
    for case, (w, blocksize) in weights().items():
        packed, plain = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4", compress_statistics=False)
        _, nested = bnb.quantize_4bit(w, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
        found = {
            "w": w,
            "packed": packed.flatten(),
            "absmax": plain.absmax,
            "absmax_q": nested.absmax,
            "absmax_scale": nested.state2.absmax,
            "absmax_offset": nested.offset,
        }
        for name, dtype in DTYPES.items() if case.startswith("normal") else [("bf16", torch.bfloat16)]:
            nested.dtype = dtype
            found[f"dequantized/{name}"] = bnb.dequantize_4bit(packed, nested).flatten()
        tensors |= {f"{case}/{key}": value.contiguous() for key, value in found.items()}
        metadata[case] = str(blocksize)
    return tensors, metadata


def load() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the committed tensors and metadata."""
    with safe_open(PATH, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def main() -> int:
    """Write the file, or compare it under --check; return 1 if it differs."""
    if bitsandbytes.__version__ != VERSION:
        print(f"golden_vectors: bitsandbytes must be {VERSION}, got {bitsandbytes.__version__}", file=sys.stderr)
        return 2
    tensors, metadata = vectors()
    if "--check" not in sys.argv[1:]:
        temporary = PATH.with_suffix(".tmp")
        save_file(tensors, temporary, metadata)
        temporary.rename(PATH)
        return 0
    stored, stored_metadata = load()
    differing = [key for key in sorted(tensors | stored) if not _same(tensors.get(key), stored.get(key))]
    if differing or metadata != stored_metadata:
        print(f"golden_vectors: {PATH} differs from a fresh run in {differing or 'its metadata'}", file=sys.stderr)
        return 1
    return 0


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


if __name__ == "__main__":
    sys.exit(main())
