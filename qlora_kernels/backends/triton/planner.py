"""The choice of kernel and tile, by pure functions from (Problem, Arch) to a Plan.

    plan(problem, arch) = the tuned plan for the problem's bucket, if ops/tuned/sm_<arch>.json holds one,
                          else the candidate with the smallest modelled time

The model divides bytes by bandwidth, flops by throughput and instructions by issue slots. Its constants are from data
sheets and static instruction counts, not measurements, so that it also gives reasonable plans for GPUs without tuning.
`qlora-kernels bench tune` replaces it, shape by shape, by measured times. Nothing is tuned during normal calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache

import torch

from ...ops import extended_k, measured_plans
from ...ops.operands import Weight
from ...ops.registry import KernelPlan, Problem, planned_rows
from ...rounding import cdiv, round_up
from .proxy_fence import missing_fence

PATHS = ("small_m", "fused", "decode")
"""small_m: decoded into FMAs without tensor cores; forward of one or two rows. fused: decoded inside the matmul.
decode: decoded once into a workspace, followed by torch's matmul."""


@dataclass(frozen=True)
class Arch:
    """The model's figures of a GPU: sustained rates; flops are dense bf16 with fp32 sums."""

    name: str
    sm_count: int
    bytes_per_s: float
    flops_per_s: float
    clock_hz: float
    shared_bytes: int


ARCHS = {
    80: Arch("A100", 108, 1.75e12, 260e12, 1.41e9, 166912),
    86: Arch("RTX 3090", 82, 0.84e12, 62e12, 1.70e9, 101376),
    89: Arch("RTX 4090", 128, 0.92e12, 150e12, 2.50e9, 101376),
    90: Arch("H100", 132, 3.0e12, 650e12, 1.70e9, 232448),
    100: Arch("B200", 148, 7.0e12, 1600e12, 1.85e9, 232448),
    120: Arch("RTX 5090", 170, 1.6e12, 200e12, 2.40e9, 101376),
}
"""Compute capability -> figures. Other capabilities use the nearest one below."""

LAUNCH_S = 3e-6
FUSED_EFFICIENCY = 0.5
"""Assumed share of torch's matmul rate that a fused main loop reaches: the conservative end of published kernels that
decode 4-bit weights in registers."""
DECODE_INSTRUCTIONS = 8.0
"""SASS instructions per decoded weight in a fused main loop, with all instructions of the loop (kernels report)."""
SMALL_M_INSTRUCTIONS = {1: 5.2, 2: 7.8}
"""Rows of x -> SASS instructions per weight of the small_m main loop, products included. Three rows take over 9, and in
fp32 they spill on sm_120."""
SMALL_M_WARPS = 8
"""Warps per SM that saturate bandwidth in small_m, each with 2 KiB in flight; an H100 needs 14 KiB per SM (bandwidth x
600 ns)."""
PACKED_BYTES = 0.516
"""Bytes per weight with double quantization at blocks of 64."""


@dataclass(frozen=True)
class Plan:
    """One way to run a matmul op. For path == "decode", the block sizes and split_k are not used."""

    path: str
    block_m: int = 64
    block_n: int = 128
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


def fused_obstacles(problem: Problem) -> list[str]:
    """Return why the fused kernels cannot run a problem; the decode path can run all."""
    obstacles = []
    if problem.K % problem.blocksize:
        obstacles.append(f"K={problem.K} is not a multiple of blocksize={problem.blocksize}")
    if problem.dtype == torch.float32 and problem.M > 16:
        obstacles.append("fp32 products have no tensor core; above 16 rows the library's matmul is faster")
    return obstacles


def candidates(problem: Problem) -> list[Plan]:
    """Return every plan that may be chosen for the problem."""
    plans = [Plan("decode")]
    if fused_obstacles(problem):
        return plans
    if problem.op == "linear_nf4" and problem.M in SMALL_M_INSTRUCTIONS:
        plans += small_m_plans(problem)
    block_k = min(64, problem.blocksize)
    reduction = problem.K if problem.op != "linear_nf4_grad_x" else problem.N
    for block_m, block_n, num_warps in ((16, 64, 4), (16, 128, 4), (32, 128, 4), (64, 128, 4), (128, 128, 8)):
        if block_m > 16 and (block_m >= 2 * problem.M or problem.dtype == torch.float32):
            continue
        if problem.op == "linear_nf4_grad_x":
            block_n = 64
            num_warps = 4
        split = 1
        while split <= 16 and reduction // (split * 64) >= 4:
            plans.append(Plan("fused", block_m, block_n, block_k, split, num_warps))
            split *= 2
        if split == 1:
            plans.append(Plan("fused", block_m, block_n, block_k, 1, num_warps))
    return list(dict.fromkeys(plans))


def small_m_plans(problem: Problem) -> list[Plan]:
    """Return the small_m plans; a warp computes four rows of w.

    For one row of x, the step along K is the one with less padding. For two rows it is the shorter one, because the
    longer one spills on sm_120.
    """
    widths = (1024, 512) if problem.M == 1 else (512,)
    block_k = min(widths, key=lambda width: round_up(problem.K, width))
    splits = [split for split in (1, 2, 4, 8, 16) if split == 1 or split * block_k <= problem.K]
    return [Plan("small_m", problem.M, 4, block_k, split, num_warps=1, num_stages=1) for split in splits]


def modelled_parts(problem: Problem, candidate: Plan, arch: Arch) -> dict[str, float]:
    """Return the seconds of the base matmul under a plan, by resource. LoRA adds the same to every plan and is left
    out.

    DRAM traffic overlaps with the rest; tensor cores and decoding share the issue slots and do not overlap.
    """
    M, N, K = problem.M, problem.N, problem.K
    flops = 2.0 * M * N * K
    activations = 2.0 * M * (N + K)
    # fp32 products run on the FMA pipes: 128 lanes with two flops each per cycle.
    flops_per_s = arch.flops_per_s if problem.dtype != torch.float32 else 256 * arch.sm_count * arch.clock_hz
    issue_per_s = arch.sm_count * 128 * arch.clock_hz
    if candidate.path == "decode":
        return {
            "decode": (PACKED_BYTES + 2) * N * K / arch.bytes_per_s,
            "tensor core": flops / flops_per_s,
            "DRAM": (2.0 * N * K + activations) / arch.bytes_per_s,
            "overhead": 2 * LAUNCH_S,
        }
    across, block = (N, candidate.block_n) if problem.op != "linear_nf4_grad_x" else (K, candidate.block_k)
    # A second pass over fp32 partial sums, which mostly stay in L2.
    partial = (
        0.0 if candidate.split_k == 1 else LAUNCH_S + 8.0 * candidate.split_k * M * across / (3 * arch.bytes_per_s)
    )
    if candidate.path == "small_m":
        used = min(1.0, cdiv(N, block) * candidate.split_k / (SMALL_M_WARPS * arch.sm_count))
        padded_k = round_up(K, candidate.block_k)
        return {
            "decode": SMALL_M_INSTRUCTIONS[M] * N * padded_k / (issue_per_s * used),
            "tensor core": 0.0,
            "DRAM": (PACKED_BYTES * N * K + activations) / (arch.bytes_per_s * used),
            "overhead": LAUNCH_S + partial,
        }
    tiles_m = cdiv(M, candidate.block_m)
    programs = tiles_m * cdiv(across, block) * candidate.split_k
    waves = cdiv(programs, arch.sm_count)
    used = programs / (waves * arch.sm_count)
    padded = 2.0 * tiles_m * candidate.block_m * N * K
    return {
        "decode": tiles_m * N * K * DECODE_INSTRUCTIONS / (issue_per_s * used),
        "tensor core": padded / (FUSED_EFFICIENCY * flops_per_s * used),
        "DRAM": (PACKED_BYTES * N * K + activations) / (arch.bytes_per_s * min(1.0, 1.5 * used)),
        "overhead": LAUNCH_S + partial,
    }


def modelled_seconds(problem: Problem, candidate: Plan, arch: Arch) -> float:
    """Return the modelled time of the base matmul under a plan."""
    parts = modelled_parts(problem, candidate, arch)
    if candidate.path == "decode":
        return parts["decode"] + max(parts["tensor core"], parts["DRAM"]) + parts["overhead"]
    return max(parts["DRAM"], parts["tensor core"] + parts["decode"]) + parts["overhead"]


def bound_of(problem: Problem, candidate: Plan, arch: Arch) -> str:
    """Return the name of the largest of modelled_parts."""
    parts = modelled_parts(problem, candidate, arch)
    return max(parts, key=lambda part: parts[part])


def plan(problem: Problem, capability: int) -> Plan:
    """Return the plan for `problem` on a GPU of compute capability `capability` (90 for 9.0).

    Raises ValueError for a plan of use_plan that would read wrong scales.
    """
    return plan_of(
        problem.op,
        problem.dtype,
        problem.M,
        problem.N,
        problem.K,
        problem.blocksize,
        problem.double_quant,
        capability,
    )


def plan_of(
    op: str, dtype: torch.dtype, M: int, N: int, K: int, blocksize: int, double_quant: bool, capability: int
) -> Plan:
    """Return `plan` of a base product on a GPU, without a Problem: a layer asks for it in every call.

    Raises ValueError if `use_plan` forces a plan that does not suit K and blocksize.
    """
    forced = _forced.get(op)
    if forced is None:
        return _plan(op, dtype, planned_rows(M), N, K, blocksize, double_quant, capability)
    if forced.path != "decode" and K % blocksize:
        raise ValueError(
            f"use_plan: path must be decode where K is not a multiple of blocksize, got {forced.path} for "
            f"K={K}, blocksize={blocksize}; use Plan('decode')"
        )
    if forced.path == "fused" and blocksize % forced.block_k:
        raise ValueError(
            f"use_plan: block_k must divide blocksize={blocksize}, got {forced.block_k}; use a smaller one"
        )
    return forced


@lru_cache(maxsize=4096)
def _plan(
    op: str, dtype: torch.dtype, M: int, N: int, K: int, blocksize: int, double_quant: bool, capability: int
) -> Plan:
    problem = Problem(op, "cuda", dtype, M, N, K, 0, blocksize, double_quant)
    unserved = "fused" if missing_fence(capability) is not None else None
    tuned = tuned_plans(capability).get(measured_plans.bucket(problem))
    if tuned is not None and tuned.path != unserved and (tuned.path == "decode" or not fused_obstacles(problem)):
        return tuned
    arch, served = arch_for(capability), [each for each in candidates(problem) if each.path != unserved]
    return min(served, key=lambda candidate: modelled_seconds(problem, candidate, arch))


def kernel_plan(problem: Problem, capability: int) -> KernelPlan:
    """Return the plan in the registry's form, with the modelled time and the limiting resource."""
    chosen, arch = plan(problem, capability), arch_for(capability)
    tuned = tuned_plans(capability).get(measured_plans.bucket(problem)) == chosen
    source = "measured best" if tuned else f"least modelled time on {arch.name}"
    microseconds = 1e6 * modelled_seconds(problem, chosen, arch)
    reason = f"{source}, {microseconds:.1f} us, bound by {bound_of(problem, chosen, arch)}"
    if chosen.path == "decode":
        obstacles = [*fused_obstacles(problem), *filter(None, [missing_fence(capability)])]
        return KernelPlan("dequantize_nf4, then torch.matmul", {}, "; ".join([*obstacles, reason]))
    tile = {name: size for name, size in asdict(chosen).items() if name != "path"}
    return KernelPlan(f"{problem.op}_{chosen.path}", tile, reason)


def addition_reason(
    op: str, M: int, weights: Sequence[Weight], dtype: torch.dtype, dropout: bool, capability: int
) -> str | None:
    """Return why the low-rank terms of linears on one x are not inside base products over K + r (ops/extended_k.py).

    None if they are inside. op: a LoRA op, forward or backward, of one linear or of a group.
    """
    backward = op.endswith("_backward")
    base = "linear_nf4_grad_x" if backward else "linear_nf4"
    for weight in weights:
        sizes = (weight.N, weight.K, weight.blocksize, weight.double_quant)
        if plan_of(base, dtype, M, *sizes, capability).path != "decode":
            return "the kernel that decodes inside adds it to its sums"
        if not backward and weight.K % decoded_row(weight.blocksize):
            return f"K={weight.K} is not a multiple of {decoded_row(weight.blocksize)}, the weights of a decoder's row"
    K, N = weights[0].K, sum(weight.N for weight in weights)
    if backward:
        return extended_k.backward_obstacle(K, N, len(weights), dropout, dtype, capability)
    return extended_k.forward_obstacle(K, N, dtype, capability)


def decoded_row(blocksize: int) -> int:
    """Return the weights of a row of the decoder's tile, which lies inside one block."""
    return min(blocksize, 64)


def lora_plan(problem: Problem, capability: int) -> KernelPlan:
    """Return the plan of a LoRA linear: that of its base matmul, and where the low-rank term is added."""
    backward = problem.op.endswith(("_backward", "_grad_x"))
    base = problem._replace(op="linear_nf4_grad_x" if backward else "linear_nf4", device="cuda", r=0, dropout=False)
    chosen = kernel_plan(base, capability)
    if problem.r == 0 or plan(base, capability).path != "decode":
        return chosen
    if problem.op.startswith("linear_nf4_lora_merged"):
        return replace(chosen, kernel=extended_k.MERGED)
    weight = Weight(torch.empty(0), None, None, None, None, problem.blocksize, problem.N, problem.K)
    reason = addition_reason(problem.op, problem.M, [weight], problem.dtype, problem.dropout, capability)
    after = extended_k.INSIDE if reason is None else extended_k.ADDED
    return replace(
        chosen, kernel=f"dequantize_nf4, then {after}", reason="; ".join(filter(None, (chosen.reason, reason)))
    )


@cache
def arch_for(capability: int) -> Arch:
    """Return the model's figures for a capability, or for the nearest one below it."""
    known = [c for c in ARCHS if c <= capability]
    return ARCHS[max(known)] if known else ARCHS[min(ARCHS)]


@cache
def tuned_plans(capability: int) -> dict[str, Plan]:
    """Return bucket -> the fastest measured plan; empty without measurements or if the CUDA backend was faster."""
    return {
        key: Plan(**{name: value for name, value in fields.items() if name != "backend"})
        for key, fields in measured_plans.entries(capability).items()
        if fields["backend"] == "triton"
    }


_forced: dict[str, Plan] = {}


def forced_plan(op: str) -> Plan | None:
    """Return the plan of `use_plan`, or None outside of it."""
    return _forced.get(op)


@contextmanager
def use_plan(op: str, forced: Plan) -> Iterator[None]:
    """Run `op` by one plan inside the block, for tests, tuning and the compile report; `plan` validates it."""
    before = _forced.get(op)
    _forced[op] = replace(forced)
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before


_assumed: int | None = None

INTERPRETED_CAPABILITY = 80
"""Capability that is assumed for CPU tensors, so that the interpreter runs the plan of a GPU."""


def capability_of(device: torch.device) -> int:
    """Return the compute capability of `device` as one number, 90 for 9.0."""
    if device.type != "cuda":
        return _capability_at(-1)
    return _capability_at(torch.cuda.current_device() if device.index is None else device.index)


def capability_for(tensor: torch.Tensor) -> int:
    """Return the compute capability of the tensor's device. It takes less time than a torch.device does."""
    return _capability_at(tensor.get_device())


def _capability_at(index: int) -> int:
    """Return the capability of the GPU with this index, -1 for the CPU."""
    if _assumed is not None:
        return _assumed
    return INTERPRETED_CAPABILITY if index < 0 else _capability_of_cuda(index)


@cache
def _capability_of_cuda(index: int) -> int:
    """Return the capability of a GPU; torch's answer takes microseconds, and a layer asks several times."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@contextmanager
def assume_capability(capability: int) -> Iterator[None]:
    """Plan for a GPU of another capability inside the block, for ahead-of-time compilation."""
    global _assumed
    before, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = before
