"""Rows of every Triton kernel in every config that untuned dispatch can choose; the launchers run on a mock GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor

from qlora_kernels.backends.triton.dequantize_nf4 import dequantize_nf4
from qlora_kernels.backends.triton.dropout import dropout_of
from qlora_kernels.backends.triton.glu import glu, glu_backward
from qlora_kernels.backends.triton.linear_cross_entropy import linear_cross_entropy
from qlora_kernels.backends.triton.linear_nf4 import linear_nf4, linear_nf4_grad_x
from qlora_kernels.backends.triton.linear_nf4_lora import linear_nf4_lora, linear_nf4_lora_backward
from qlora_kernels.backends.triton.linear_nf4_lora_merged import merge_lora
from qlora_kernels.backends.triton.linear_nf4_multi_lora import linear_nf4_multi_lora, linear_nf4_multi_lora_backward
from qlora_kernels.backends.triton.lora_down import lora_down
from qlora_kernels.backends.triton.planner import (
    Plan,
    arch_for,
    assume_capability,
    bound_of,
    candidates,
    plan,
    use_plan,
)
from qlora_kernels.backends.triton.quantize_absmax import quantize_absmax
from qlora_kernels.backends.triton.quantize_nf4 import quantize_nf4
from qlora_kernels.backends.triton.rms_norm import rms_norm, rms_norm_backward
from qlora_kernels.backends.triton.rope import rope
from qlora_kernels.ops.glu import ACTIVATIONS
from qlora_kernels.ops.operands import LoRA, MultiLoRA, Needs, Weight
from qlora_kernels.ops.output_head import Head
from qlora_kernels.ops.registry import Problem
from qlora_kernels.rounding import cdiv

from .mock_gpu import Compiled, compiling_for
from .row import Row, occupancy
from .sass import Facts, facts_of

N, K, V = 4096, 4096, 128256
BLOCKSIZE = 64
ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
"""Values of M for which dispatch is evaluated; its thresholds are between them."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ROW_OPERANDS = ("p_w", "p_x", "p_grad_y", "p_gate", "p_out")
"""Parameters whose dtype names a launch; the first one that a kernel has is used."""

FUSED = ("linear_nf4_kernel", "linear_nf4_grad_x_kernel")
SMALL_M = "linear_nf4_small_m_kernel"
MODEL_PARTS = ("rms_norm_kernel", "rms_norm_backward_kernel", "rope_kernel", "glu_kernel", "glu_backward_kernel")
CODEC = ("dequantize_nf4_kernel", "quantize_nf4_kernel", "quantize_absmax_kernel")
NO_MATMUL = (*CODEC, *MODEL_PARTS, "sum_partials_kernel", "cross_entropy_rows_kernel", SMALL_M)


@dataclass(frozen=True)
class Case:
    """A call of a launcher, under a plan if there is a choice."""

    run: Callable[[], object]
    problem: Problem | None = None
    plan: Plan | None = None


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without memory, whose address counts as divisible by 16, as the allocator's addresses are."""
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(double_quant: bool = True, blocksize: int = BLOCKSIZE) -> Weight:
    """Return a quantized weight [N, K] in the form that ops pass to kernels."""
    packed, blocks = meta(N * K // 2, dtype=torch.uint8), N * K // blocksize
    if not double_quant:
        return Weight(packed, meta(blocks), None, None, None, blocksize, N, K)
    nested = meta(blocks, dtype=torch.uint8), meta(cdiv(blocks, 256)), meta()
    return Weight(packed, None, *nested, blocksize, N, K)


def codec_cases(full: bool) -> Iterator[Case]:
    """Yield dequantization by dtype, double quantization and blocksize; quantization; double quantization."""
    for name in DTYPES if full else ("bf16",):
        for double_quant in (True, False):
            for blocksize in (32, 64, 128, 4096) if full and name == "bf16" else (64,):
                w, out = weight(double_quant, blocksize), meta(N, K, dtype=DTYPES[name])
                yield Case(partial(dequantize_nf4, w, out=out))
        extended = meta(N, K + 16, dtype=DTYPES[name])[:, :K]
        yield Case(partial(dequantize_nf4, weight(), out=extended))
        yield Case(partial(quantize_nf4, meta(N, K, dtype=DTYPES[name]), blocksize=64))
    yield Case(lambda: quantize_absmax(meta(N * K // BLOCKSIZE)))


def model_part_cases(full: bool) -> Iterator[Case]:
    """Yield the ops between linear layers, for 1024 tokens of width 4096."""
    for dtype in DTYPES.values() if full else (torch.bfloat16,):
        x, weight_row, scale = meta(1024, 4096, dtype=dtype), meta(4096, dtype=dtype), meta(1024)
        yield Case(partial(rms_norm, x, x, weight_row, 1e-5, 0.0))
        yield Case(partial(rms_norm_backward, x, x, x, weight_row, scale, 0.0, need_grad_weight=True))
        q, table = meta(4, 256, 32, 128, dtype=dtype).transpose(1, 2), meta(1, 256, 128, dtype=dtype)
        yield Case(partial(rope, q, q, table, table, False))
        for activation in ACTIVATIONS:
            yield Case(partial(glu, x, x, activation))
            yield Case(partial(glu_backward, x, x, x, activation))


def plans_of(op: str, dtype: torch.dtype, capability: int, full: bool) -> Iterator[tuple[Problem, Plan]]:
    """Yield (problem, fused plan): the plans that dispatch chooses for ROWS; with full, each other candidate's tile
    too.
    """
    seen = set()
    for M in ROWS:
        problem = Problem(op, "cuda", dtype, M, N, K, 0, BLOCKSIZE, True)
        picked = plan(problem, capability)
        for candidate in [picked, *(candidates(problem) if full else [])]:
            # The number of splits changes the grid but not the code.
            key = (candidate.path, candidate.block_m, candidate.block_n, candidate.block_k, candidate.split_k > 1)
            if candidate.path != "decode" and key not in seen:
                seen.add(key)
                yield problem, candidate


def linear_cases(capability: int, full: bool) -> Iterator[Case]:
    """Yield the fused kernels, forward and backward, without and with an adapter."""
    for name in DTYPES if full else ("bf16",):
        dtype = DTYPES[name]
        for op in ("linear_nf4", "linear_nf4_grad_x"):
            for problem, chosen in plans_of(op, dtype, capability, full):
                rows = meta(problem.M, N if op == "linear_nf4_grad_x" else K, dtype=dtype)
                for double_quant in (True, False) if full else (True,):
                    w = weight(double_quant)
                    if op == "linear_nf4":
                        yield Case(partial(linear_nf4, rows, w, meta(N)), problem, chosen)
                    else:
                        yield Case(partial(linear_nf4_grad_x, rows, w), problem, chosen)
                if chosen.split_k == 1:
                    yield Case(partial(lora_call, problem, 16), problem, chosen)


def lora_call(problem: Problem, r: int, backward_dropout: float = 0.1) -> object:
    """Call one linear with an adapter, in the direction of `problem.op`; forward has no dropout."""
    x, grad_y = meta(problem.M, K, dtype=problem.dtype), meta(problem.M, N, dtype=problem.dtype)
    lora = LoRA(meta(r, K), meta(N, r), meta(1, dtype=torch.int64), 2.0, 0.0)
    if problem.op == "linear_nf4":
        return linear_nf4_lora(x, weight(), None, lora)
    s = meta(problem.M, r, dtype=problem.dtype)
    return linear_nf4_lora_backward(grad_y, x, s, weight(), lora._replace(dropout_p=backward_dropout), Needs())


def adapter_cases(full: bool) -> Iterator[Case]:
    """Yield the kernels around the base matmul: low-rank kernels at training sizes, and the multi-adapter ones."""
    yield from adapter_cases_of(torch.bfloat16, (8, 64, 256) if full else (16,))
    if full:
        yield from adapter_cases_of(torch.float32, (16, 64))


def adapter_cases_of(dtype: torch.dtype, ranks: Iterable[int]) -> Iterator[Case]:
    """Yield the adapter cases for activations of one dtype."""
    M, decode = 4096, Plan("decode")
    seed = meta(1, dtype=torch.int64)
    for r in ranks:
        for op in ("linear_nf4", "linear_nf4_grad_x"):
            problem = Problem(op, "cuda", dtype, M, N, K, 0, BLOCKSIZE, True)
            yield Case(partial(lora_call, problem, r), problem, decode)
        yield Case(partial(lora_call, problem, r, 0.0), problem, decode)  # the low-rank term inside the product
        if dtype != torch.float32:
            lora = LoRA(meta(r, K), meta(N, r), None, 2.0, 0.0)
            yield Case(partial(merge_lora, weight(), lora, meta(N, K, dtype=dtype)))
        x = meta(M, K, dtype=dtype)
        yield Case(partial(lora_down, x, meta(r, K), dropout_of(seed, 0.1, x)))
    problem = Problem("linear_nf4", "cuda", dtype, M, N, K, 0, BLOCKSIZE, True)
    x, grad_y, s = meta(M, K, dtype=dtype), meta(M, N, dtype=dtype), meta(M, 16, dtype=dtype)
    adapters = MultiLoRA(meta(8, 16, K), meta(8, N, 16), meta(8), meta(M, dtype=torch.int64), seed, 0.1)
    yield Case(lambda: linear_nf4_multi_lora(x, weight(), None, adapters), problem, decode)
    yield Case(lambda: linear_nf4_multi_lora_backward(grad_y, x, s, weight(), adapters, Needs()), problem, decode)


def loss_cases(full: bool) -> Iterator[Case]:
    """Yield head and loss, whose matmuls are the library's."""
    for name in DTYPES if full else ("bf16",):
        for bias, softcap in ((None, 0.0), (meta(V), 30.0)) if full else ((None, 0.0),):
            head = Head(meta(V, K, dtype=DTYPES[name]), bias, -100, 1.0, softcap)
            hidden, labels = meta(256, K, dtype=DTYPES[name]), meta(256, dtype=torch.int64)
            yield Case(partial(linear_cross_entropy, hidden, labels, head, need_grad_hidden=True))


def compile_case(case: Case, capability: int) -> list[Compiled]:
    """Return all launches of a case, whose plan applies to both matmul ops, forward and backward."""
    with ExitStack() as stack:
        stack.enter_context(assume_capability(capability))
        launches = stack.enter_context(compiling_for(capability))
        if case.plan is not None:
            for op in ("linear_nf4", "linear_nf4_grad_x"):
                stack.enter_context(use_plan(op, case.plan))
        case.run()
    return launches


def weights_per_thread(launch: Compiled) -> float | None:
    """Return the number of weights per thread of a codec kernel, which is unrolled."""
    threads = 32 * launch.constants["num_warps"]
    if launch.name == "dequantize_nf4_kernel":
        return float(launch.constants["TILES"] * launch.constants["ROWS"] * launch.constants["ROW_BYTES"] * 2 / threads)
    if launch.name == "quantize_nf4_kernel":
        return float(launch.constants["BLOCKS"] * launch.constants["BLOCKSIZE"] / threads)
    return None


def per_weight(launch: Compiled, facts: Facts) -> float | None:
    """Return SASS instructions per weight, of the kernel for the codec, of the main loop for a fused matmul."""
    weights = weights_per_thread(launch)
    if weights is not None:
        return round(facts.total / weights, 2)
    if launch.name in (*FUSED, SMALL_M):
        # In the main loop each decoded weight is one shuffle.
        instructions, shuffles = facts.hottest_loop("SHFL")
        return round(instructions / shuffles, 2) if shuffles else None
    return None


def wide_loads_needed(launch: Compiled) -> int:
    """Return the number of loads of small_m's words and x if all are 16 bytes wide, including those before the loop."""
    if launch.name != SMALL_M:
        return 1
    c, x = launch.constants, launch.arguments["p_x"]
    lane_bytes = 16 * 32 * c["num_warps"]
    return int((2 * c["BLOCK_N"] * c["BLOCK_K"] // 2 + c["M"] * c["BLOCK_K"] * x.element_size()) // lane_bytes)


STEP_COUNTS = "%first"
"""The start of a split in steps: the one product of run-time numbers that cannot overflow."""


def narrow_products(ttir: str) -> list[str]:
    """Return the names of 32-bit products of two run-time numbers; row offsets must be computed in 64 bits."""
    constants = set(re.findall(r"(%\w+) = arith\.constant", ttir))
    products = re.findall(r"(%\w+) = arith\.muli (%\w+), (%\w+) : (\S+)", ttir)
    return [
        name
        for name, a, b, kind in products
        if "i64" not in kind and constants.isdisjoint((a, b)) and not name.startswith(STEP_COUNTS)
    ]


def label(launch: Compiled) -> str:
    """Return the description of one compilation of a kernel: dtype, tile, and the flags that are set."""
    signature, constants = launch.kernel.src.signature, launch.constants
    words = [next((signature[name].lstrip("*") for name in ROW_OPERANDS if name in signature), "")]
    words += [f"M{constants['M']}"] if "M" in constants else []
    tile = [f"{axis}{constants[f'BLOCK_{axis}']}" for axis in "MNKCR" if f"BLOCK_{axis}" in constants]
    words.append(" ".join(tile))
    if "BLOCKSIZE" in constants:
        words.append(f"b{constants['BLOCKSIZE']}")
    flags = {
        "DOUBLE_QUANT": "dq",
        "HAS_LORA": "lora",
        "HAS_BIAS": "bias",
        "SPLIT": "split",
        "SHORT_TAIL": "tail",
        "STRIDED": "rows",
        "COPY": "copy",
        "GELU": "gelu",
        "SOFTCAP": "softcap",
    }
    words += [word for flag, word in flags.items() if constants.get(flag)]
    if constants.get("DROPOUT"):
        words.append("dropout")
    return " ".join(word for word in words if word)


def row_of(launch: Compiled, case: Case, capability: int) -> Row:
    """Return the report's row for one launch."""
    kernel = launch.kernel
    facts = facts_of(kernel.asm["cubin"], kernel.metadata.name)
    family, count = facts.tensor_core
    config = label(launch)
    bound = ""
    if launch.name in (*FUSED, SMALL_M) and case.problem is not None and case.plan is not None:
        bound = bound_of(case.problem, case.plan, arch_for(capability))
    return Row(
        source="triton",
        kernel=launch.name,
        config=config,
        arch=capability,
        registers=facts.registers,
        spills=facts.spills,
        shared=kernel.metadata.shared,
        occupancy=round(occupancy(capability, facts.registers, kernel.metadata.shared, kernel.metadata.num_warps), 3),
        tensor_core=family,
        tensor_core_count=count,
        wide_loads=facts.wide_loads,
        narrow_copies=facts.narrow_copies,
        instructions=facts.total,
        per_weight=per_weight(launch, facts),
        bound=bound or ("DRAM" if launch.name in NO_MATMUL else ""),
        # fp32 products run on the FMA pipes.
        matmul=not config.startswith("fp32")
        and (launch.name in FUSED or (launch.name not in NO_MATMUL and launch.constants.get("HAS_LORA", True) is True)),
        wide_loads_needed=wide_loads_needed(launch),
        narrow_products=len(narrow_products(kernel.asm["ttir"])),
    )


def triton_rows(archs: Iterable[int], full: bool) -> list[Row]:
    """Return every row; full: also the dtypes, blocksizes, ranks and tiles that CI's subset leaves out."""
    rows: dict[tuple[str, str, int], Row] = {}
    for arch in archs:
        cases = [*codec_cases(full), *model_part_cases(full), *linear_cases(arch, full), *adapter_cases(full)]
        for case in [*cases, *loss_cases(full)]:
            for launch in compile_case(case, arch):
                row = row_of(launch, case, arch)
                rows.setdefault((row.kernel, row.config, row.arch), row)
    return list(rows.values())


def triton_rows_of_each(archs: Sequence[int], full: bool) -> list[Row]:
    """Return the rows of `triton_rows`, with the architectures compiled in parallel, one in a process."""
    with ProcessPoolExecutor(min(len(archs), os.cpu_count() or 1), get_context("spawn")) as pool:
        return [row for rows in pool.map(partial(_rows_of_one, full=full), archs) for row in rows]


def _rows_of_one(arch: int, full: bool) -> list[Row]:
    return triton_rows([arch], full)
