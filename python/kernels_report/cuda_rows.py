"""Rows of csrc/cuda, compiled by nvcc for each architecture, and of bitsandbytes' kernels for the same operations.

Cubins are cached by content in build/kernels_report. Those of bitsandbytes are extracted from its installed wheel.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..build_support.cuda import SM90A_SOURCES
from ..build_support.cuda_toolkit import cuda_home
from ..build_support.native import CSRC, ROOT, headers
from .row import SHARED_RESERVED, Row, occupancy
from .sass import TOOLS, Facts, all_facts

CACHE = ROOT / "build" / "kernels_report"
FLAGS = ("-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-Werror", f"-I{CSRC / 'include'}")
TYPES = {"float": "fp32", "__nv_bfloat16": "bf16", "__half": "fp16"}

THREADS = {
    "dequantize_nf4": 128,
    "dequantize_nf4_rows": 128,
    "merge_lora": 128,
    "rest of dequantize_nf4": 128,
    "linear_nf4_small_m": 128,
    "linear_nf4_gemm": 128,
}
DEFAULT_THREADS = 256

WEIGHTS_PER_THREAD = {"dequantize_nf4": 64, "dequantize_nf4_rows": 64, "quantize_nf4": 8}
"""Weights that one pass of a thread through the kernel's code processes."""

DYNAMIC_SHARED = {"linear_nf4_pairs": 256 * 256 + 8 * 2 * 4 * 32 * 4 + 256 * 4} | {
    f"linear_nf4_wgmma M{rows}": 4 * (rows * 64 * 2 + 128 * 32) + 256 * 256 + 256 * 4 for rows in (64, 128, 256)
}
"""Bytes of shared memory that a launch asks for, by kernel and tile: PairsShared, WgmmaShared."""

GEMM_WEIGHTS, PAIRS_WEIGHTS, WGMMA_WEIGHTS = 64, 256, 128
"""Weights that a thread of linear_nf4_gemm, linear_nf4_pairs and linear_nf4_wgmma decodes in one iteration of its main
loop."""

SERIALIZED = "wgmma.mma_async instructions are serialized"
"""In ptxas's remark that it waits for each wgmma; it is no warning, so -Werror does not stop it."""

MERGE_WEIGHTS = 32
"""Weights that a thread of merge_lora writes in one iteration of its main loop."""

MATMUL_KERNELS = ("linear_nf4_gemm", "linear_nf4_pairs", "linear_nf4_wgmma", "lora_down", "merge_lora")

PEER_KERNELS = {
    # bitsandbytes' kernel -> (the job, weights of one pass of a thread or None)
    r"kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>": ("dequantize_nf4, one level", 16),
    r"kQuantizeBlockwiseSmall<__nv_bfloat16, 64, 2>": ("quantize_nf4, first level", None),
    r"kOptimizer32bit2State<__nv_bfloat16, 0>": ("adamw_step, 32-bit states", None),
    r"gemm_4bit_simt<__nv_bfloat16, 1>": ("linear_nf4_small_m", None),
    r"gemm_4bit_sm80_m16n8k16<__nv_bfloat16,.*": ("linear_nf4_gemm", None),
}

EMPTY = 8
"""Number of instructions of a kernel without a body; the peer leaves some kernels empty on some architectures."""


class CompileError(RuntimeError):
    """nvcc reported an error or a warning; the message is nvcc's."""


def cuda_rows(archs: list[int]) -> list[Row]:
    """Return one row per kernel and architecture of csrc/cuda and of the peer; empty without nvcc."""
    if cuda_home() is None:
        return []
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    jobs = [(source, arch) for source in sources for arch in archs if has_kernels(source, arch)]
    with ThreadPoolExecutor(2) as pool:
        rows = [row for found in pool.map(lambda job: rows_of(*job), jobs) for row in found]
    return rows + peer_rows(archs)


def has_kernels(source: Path, arch: int) -> bool:
    """Whether a source of csrc/cuda has kernels for an architecture."""
    return arch == 90 or source.stem not in SM90A_SOURCES


def cubin(source: Path, arch: int) -> bytes:
    """Return the cubin of one source for sm_<arch>, or sm_90a; any warning and any serialized wgmma is an error.

    Raises CompileError without nvcc, and with its messages if it fails.
    """
    home = cuda_home()
    if home is None:
        raise CompileError("nvcc is not found")
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in (source, *headers()):
        digest.update(path.read_bytes())
    kept = CACHE / f"{source.stem}.sm_{arch}.{digest.hexdigest()[:24]}.cubin"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            output = Path(folder) / "out.cubin"
            target = f"-arch=sm_{arch}{'a' if source.stem in SM90A_SOURCES else ''}"
            command = [str(home / "bin" / "nvcc"), *FLAGS, target, "-cubin", str(source), "-o", str(output)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0 or SERIALIZED in done.stdout + done.stderr:
                raise CompileError(f"{source.name} for sm_{arch}:\n{done.stdout}{done.stderr}")
            output.replace(kept)
    return kept.read_bytes()


def rows_of(source: Path, arch: int) -> list[Row]:
    """Return the resources of each kernel of a CUDA source for one architecture, from its compiled cubin."""
    facts = all_facts(cubin(source, arch))
    return [_row("cuda", *_named(signature), arch, facts[name]) for name, signature in _demangled(list(facts)).items()]


def peer_rows(archs: list[int]) -> list[Row]:
    """Return the same counts of the installed bitsandbytes' kernels; empty if it is not installed or has no cubin."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return []
    libraries = sorted(Path(spec.origin).parent.glob("libbitsandbytes_cuda13*.so"))
    return [row for arch in archs for row in _peer_rows_of(libraries[-1], arch)] if libraries else []


def _peer_rows_of(library: Path, arch: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        command = [str(TOOLS / "cuobjdump"), "-xelf", f"sm_{arch}", str(library)]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        cubins = [path.read_bytes() for path in Path(folder).glob("*.cubin")]
    rows = []
    for content in cubins:
        names = re.findall(rb"\.text\.(_Z[\w]+)", content)
        wanted = {}
        for name, signature in _demangled(sorted({n.decode() for n in names})).items():
            for pattern, (job, weights) in PEER_KERNELS.items():
                if re.search(pattern, signature.split("(", 1)[0]):
                    wanted[name] = (job, signature.removeprefix("void ").split("(", 1)[0], weights)
        facts = all_facts(content, list(wanted))
        for name, (job, config, weights) in wanted.items():
            if facts[name].total > EMPTY:
                rows.append(_row("bitsandbytes", job, config, arch, facts[name], weights))
    return rows


def _row(source: str, kernel: str, config: str, arch: int, facts: Facts, weights: int | None = None) -> Row:
    tensor_core, count = facts.tensor_core
    ours = source == "cuda"
    weights = weights or WEIGHTS_PER_THREAD.get(kernel)
    per_weight = None
    if weights:
        per_weight = facts.total / weights
    elif ours:
        per_weight = _per_weight_of_loop(kernel, config, facts)
    threads = THREADS.get(kernel, DEFAULT_THREADS)
    tile = " ".join([kernel, *re.findall(r"\bM\d+", config)])
    # From sm_90 on the count in a cubin of CUDA 13 includes what the system reserves.
    static = max(facts.static_shared - SHARED_RESERVED, 0) if ours and arch >= 90 else facts.static_shared
    shared = static + (DYNAMIC_SHARED.get(kernel, DYNAMIC_SHARED.get(tile, 0)) if ours else 0)
    return Row(
        source=source,
        kernel=kernel,
        config=config,
        arch=arch,
        registers=facts.registers,
        # Local memory for an array that is indexed at run time is counted as a spill.
        spills=facts.spills + (1 if facts.stack and not facts.spills else 0),
        shared=shared,
        occupancy=occupancy(arch, facts.registers, shared, threads // 32),
        tensor_core=tensor_core,
        tensor_core_count=count,
        wide_loads=facts.wide_loads,
        narrow_copies=facts.narrow_copies,
        instructions=facts.total,
        per_weight=per_weight,
        matmul=ours and kernel in MATMUL_KERNELS,
        default=ours,
        early_waits=facts.early_waits if ours else 0,
    )


def _named(signature: str) -> tuple[str, str]:
    """Return kernel and config of a name like void qlora::linear_nf4_gemm_kernel<__half, 64, ForwardWeights>(...)."""
    match = re.match(r"(?:void )?qlora::(\w+)_kernel(?:<(.*)>)?\(", signature)
    if match is None:
        raise ValueError(f"not a kernel of csrc/cuda: {signature}")
    kernel = match[1].replace("dequantize_nf4_rest", "rest of dequantize_nf4")
    parts = [p.strip() for p in (match[2] or "").split(",") if p.strip()]
    words = [TYPES.get(p, p.removeprefix("qlora::").removesuffix("Weights").lower()) for p in parts]
    return kernel, " ".join(f"M{w}" if i == 1 and w.isdigit() else w for i, w in enumerate(words))


def _per_weight_of_loop(kernel: str, config: str, facts: Facts) -> float | None:
    """Return the instructions of the main loop per weight that a thread decodes in one iteration; None if unknown.

    From 8 rows on linear_nf4_small_m has an inner loop, whose iterations the listing does not show.
    """
    if kernel == "linear_nf4_gemm":
        return round(facts.main_loop / GEMM_WEIGHTS, 2)
    if kernel == "merge_lora":
        return round(facts.hottest_loop("HMMA")[0] / MERGE_WEIGHTS, 2)
    if kernel == "linear_nf4_pairs":
        return round(facts.main_loop / PAIRS_WEIGHTS, 2)
    if kernel == "linear_nf4_wgmma":
        return round(facts.hottest_loop("UTMALDG")[0] / WGMMA_WEIGHTS, 2)
    small_m = re.search(r" M([124]) (\d)$", config) if kernel == "linear_nf4_small_m" else None
    return round(facts.main_loop / (32 * int(small_m[2])), 2) if small_m else None


def _demangled(names: list[str]) -> dict[str, str]:
    text = "\n".join(names)
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    return dict(zip(names, done.splitlines(), strict=True))
