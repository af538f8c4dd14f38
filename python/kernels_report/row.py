"""A row of the kernels report and the gates that it is checked against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

WARPS_PER_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
BLOCKS_PER_SM = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
SHARED_PER_SM = {80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 120: 102400}
REGISTERS_PER_SM = 65536
MAX_SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Shared memory available to one block, in bytes, by architecture."""
SHARED_RESERVED = 1024
"""Bytes of shared memory per block that the system reserves."""

TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
"""The family of matmul instructions that the compiler should use on an architecture."""


@dataclass(frozen=True)
class Row:
    """Static facts of one compiled kernel.

    source: "triton" or "cuda".   config: distinguishes this compilation of the kernel.
    occupancy: resident warps divided by the maximum of an SM.   per_weight: SASS instructions per decoded or encoded
    weight, of the whole kernel if it is unrolled, otherwise of its main loop; None for kernels without weights.
    bound: the limit of the reference problem by the model of backends/triton/planner.py.
    matmul: whether tensor-core instructions are expected.   default: whether untuned dispatch can choose the config.
    wide_loads_needed: number of 16-byte loads in code that reads weights and activations only in 16-byte loads.
    narrow_products: 32-bit products of two run-time numbers, which an index above 2^31 would overflow.
    early_waits: instructions that wait for a global load of the same iteration of the main loop before its products.
    """

    source: str
    kernel: str
    config: str
    arch: int
    registers: int
    spills: int
    shared: int
    occupancy: float
    tensor_core: str
    tensor_core_count: int
    wide_loads: int
    narrow_copies: int
    instructions: int
    per_weight: float | None
    bound: str = ""
    matmul: bool = False
    default: bool = True
    wide_loads_needed: int = 1
    narrow_products: int = 0
    early_waits: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON."""
        return asdict(self)


def occupancy(arch: int, registers: int, shared: int, warps: int) -> float:
    """Return the share of an SM's warps that are resident, limited by registers, shared memory, blocks and warps."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS_PER_SM // per_warp // warps if registers else BLOCKS_PER_SM[arch]
    by_shared = SHARED_PER_SM[arch] // (shared + SHARED_RESERVED)
    blocks = min(by_registers, by_shared, BLOCKS_PER_SM[arch], WARPS_PER_SM[arch] // warps)
    return blocks * warps / WARPS_PER_SM[arch]


DEQUANTIZE_BUDGET = 6.0
"""SASS instructions per decoded weight, for 16-bit results on sm_80 and sm_90."""

DEQUANTIZE_ROWS_BUDGET = 7.0
"""The same of the kernel whose rows have a stride, which follows the row in which its next eight weights lie."""

ONE_ROW_BUDGET = 6.0
"""The same for small_m's main loop with one row of x, products included; the tensor-core loop takes 8."""


MERGE_BUDGET = 12.0
"""The same of the main loop of merge_lora at rank 16, the update's product included, for sm_80 and sm_90."""

GEMM_BUDGETS = {"M16": 9.5, "M32": 10.5, "M64": 12.0}
"""The same of the CUDA tensor-core loop by rows of a block; the steps of LoRA, 1 to 2 instructions, count too."""


PAIRS_BUDGETS = {"M8": 2.0, "M16": 2.0, "M24": 2.3, "M32": 2.75}
"""The same of the pair-table kernel by rows of its tile."""

WGMMA_BUDGETS = {"row": 5.0, "column": 6.75}
"""The same of the wgmma kernel, forward and transposed; one warp in eight executes the instructions of a stage's
copies, about 36 of 155."""


def _shared_fits(row: Row) -> bool:
    return row.shared <= MAX_SHARED[row.arch]


def _is_fused(row: Row) -> bool:
    return row.source == "triton" and row.kernel in ("linear_nf4_kernel", "linear_nf4_grad_x_kernel")


def _is_small_m(row: Row) -> bool:
    return row.source == "triton" and row.kernel == "linear_nf4_small_m_kernel"


def _is_cuda_linear(row: Row) -> bool:
    return row.source == "cuda" and row.kernel in ("linear_nf4_small_m", "linear_nf4_gemm", "linear_nf4_pairs")


def _is_wgmma(row: Row) -> bool:
    return row.source == "cuda" and row.kernel == "linear_nf4_wgmma"


def _budget(row: Row, kernel: str, budgets: dict[str, float]) -> float | None:
    if row.source != "cuda" or row.kernel != kernel or row.arch not in (80, 90):
        return None
    return next((budget for rows, budget in budgets.items() if rows in row.config.split()), None)


def _gemm_budget(row: Row) -> float | None:
    return _budget(row, "linear_nf4_gemm", GEMM_BUDGETS)


def _pairs_budget(row: Row) -> float | None:
    return _budget(row, "linear_nf4_pairs", PAIRS_BUDGETS)


def _by_rows(budgets: dict[str, float]) -> str:
    return ", ".join(f"{budget:g} ({rows})" for rows, budget in budgets.items())


def _decodes(row: Row) -> bool:
    return row.kernel.startswith("dequantize_nf4") and row.arch in (80, 90) and "fp32" not in row.config


def _has_row_stride(row: Row) -> bool:
    return row.kernel == "dequantize_nf4_rows" or "rows" in row.config.split()


def _reads_packed_weights(row: Row) -> bool:
    decoders = ("dequantize_nf4", "dequantize_nf4_rows")
    return _is_cuda_linear(row) or (row.source == "cuda" and row.kernel in decoders)


GATES: tuple[tuple[str, Callable[[Row], bool], Callable[[Row], bool]], ...] = (
    ("no spills in a default config", lambda r: r.default, lambda r: r.spills == 0),
    ("no more shared memory than a block of the architecture may have", lambda r: True, _shared_fits),
    ("offsets in 64 bits: no 32-bit product of run-time sizes", lambda r: True, lambda r: r.narrow_products == 0),
    (
        "the architecture's own tensor-core instruction",
        lambda r: _is_fused(r) and r.matmul,
        lambda r: r.tensor_core == TENSOR_CORE[r.arch],
    ),
    # wgmma and tcgen05 need 64 rows on the left; a product with r rows has fewer.
    ("a tensor-core instruction wherever there is a matmul", lambda r: r.matmul, lambda r: r.tensor_core != ""),
    (
        f"at most {DEQUANTIZE_BUDGET:g} SASS instructions per weight in dequantize",
        lambda r: _decodes(r) and not _has_row_stride(r),
        lambda r: r.per_weight is not None and r.per_weight <= DEQUANTIZE_BUDGET,
    ),
    (
        f"at most {DEQUANTIZE_ROWS_BUDGET:g} SASS instructions per weight in dequantize with a row stride",
        lambda r: _decodes(r) and _has_row_stride(r),
        lambda r: r.per_weight is not None and r.per_weight <= DEQUANTIZE_ROWS_BUDGET,
    ),
    (
        f"at most {ONE_ROW_BUDGET:g} SASS instructions per weight in small_m with one row of 16-bit x",
        lambda r: (
            (_is_small_m(r) or (_is_cuda_linear(r) and r.kernel == "linear_nf4_small_m"))
            and "M1" in r.config.split()
            and "fp32" not in r.config
        ),
        lambda r: r.per_weight is not None and r.per_weight <= ONE_ROW_BUDGET,
    ),
    (
        f"at most {_by_rows(GEMM_BUDGETS)} SASS instructions per weight in the CUDA tensor-core loop",
        lambda r: _gemm_budget(r) is not None,
        lambda r: r.per_weight is not None and r.per_weight <= (_gemm_budget(r) or 0.0),
    ),
    (
        f"at most {MERGE_BUDGET:g} SASS instructions per weight where a LoRA update of rank 16 is added by the decoder",
        lambda r: r.source == "cuda" and r.kernel == "merge_lora" and r.arch in (80, 90) and "M1" in r.config.split(),
        lambda r: r.per_weight is not None and r.per_weight <= MERGE_BUDGET,
    ),
    (
        f"at most {_by_rows(PAIRS_BUDGETS)} SASS instructions per weight in the pair-table loop",
        lambda r: _pairs_budget(r) is not None,
        lambda r: r.per_weight is not None and r.per_weight <= (_pairs_budget(r) or 0.0),
    ),
    (
        f"at most {_by_rows(WGMMA_BUDGETS)} SASS instructions per weight in the wgmma loop",
        _is_wgmma,
        lambda r: r.per_weight is not None and r.per_weight <= WGMMA_BUDGETS[r.config.split()[-1]],
    ),
    ("wgmma in the kernel that is named after it", _is_wgmma, lambda r: r.tensor_core == "wgmma"),
    (
        "no wait for a load of the same iteration before the products of a CUDA linear's main loop",
        lambda r: _is_cuda_linear(r) or _is_wgmma(r),
        lambda r: r.early_waits == 0,
    ),
    # Rows of an adapter's factors may be narrower than 16 bytes.
    (
        "no table lookup turned into cp.async, no copy of weights or activations under 16 bytes",
        lambda r: (_is_fused(r) and "lora" not in r.config) or _is_small_m(r),
        lambda r: r.narrow_copies == 0,
    ),
    (
        "16-byte loads of weights and activations",
        lambda r: _is_fused(r) or _is_small_m(r),
        lambda r: r.wide_loads >= r.wide_loads_needed,
    ),
    ("16-byte loads of packed weights", _reads_packed_weights, lambda r: r.wide_loads > 0),
)
"""The gates: (rule, rows it applies to, test)."""


OURS = ("triton", "cuda")
"""Sources to which the gates apply; rows of a peer's kernels are listed only for comparison."""


def broken_gates(rows: list[Row]) -> list[str]:
    """Return one line for each row of this project that breaks a gate."""
    return [
        f"{row.kernel} [{row.config}] sm_{row.arch}: {promise}: "
        f"spills {row.spills}, {row.tensor_core or 'no tensor core'}, {row.per_weight} per weight, "
        f"{row.narrow_copies} narrow copies, {row.wide_loads} wide loads, {row.narrow_products} 32-bit products, "
        f"{row.early_waits} early waits"
        for promise, concerns, holds in GATES
        for row in rows
        if row.source in OURS and concerns(row) and not holds(row)
    ]
