"""Targets of every machine."""

from __future__ import annotations

from .formulas import fraction_of, memory_beside, speedup_over
from .rows import beyond_cache, is_bf16, model, rows
from .target import EVERY_MACHINE, Target

TARGETS = (
    Target("quantize + double quantize", "quantize_nf4", speedup_over("bnb"), at_least=40, machine=EVERY_MACHINE),
    Target(
        "quantize fp32, bandwidth",
        "quantize_nf4",
        fraction_of("copy"),
        lambda row: not is_bf16(row) and row["N"] >= 4096,
        at_least=0.6,
        stretch=True,
        machine=EVERY_MACHINE,
    ),
    Target("dequantize into reused output", "dequantize_nf4", fraction_of("copy"), at_least=0.8, machine=EVERY_MACHINE),
    Target(
        "forward M 1..8 cold, bandwidth",
        "linear_nf4",
        fraction_of("read"),
        rows(1, 8, mode="cold"),
        at_least=0.8,
        machine=EVERY_MACHINE,
    ),
    Target(
        "1 -> 2 threads at M 256",
        "linear_nf4",
        speedup_over("ours, 1 thread"),
        rows(256, 256),
        at_least=1.8,
        machine=EVERY_MACHINE,
    ),
    Target(
        "AVX2 and AVX-512 without BF16, fp32 M 256",
        "linear_nf4",
        fraction_of("fma"),
        lambda row: row["forced_isa"] in ("avx2", "avx512"),
        at_least=0.75,
        machine=EVERY_MACHINE,
    ),
    Target(
        "AdamW step, fp32 states, bandwidth",
        "adamw_step",
        fraction_of("copy"),
        beyond_cache,
        at_least=0.8,
        machine=EVERY_MACHINE,
    ),
    Target(
        "AdamW step, fp32 states, over torch", "adamw_step", speedup_over("torch"), at_least=1.0, machine=EVERY_MACHINE
    ),
    Target(
        "AdamW step, 8-bit states, bandwidth",
        "adamw_step",
        fraction_of("copy"),
        beyond_cache,
        at_least=0.8,
        contender="ours 8-bit",
        machine=EVERY_MACHINE,
    ),
    Target(
        "AdamW step, 8-bit states, over torch",
        "adamw_step",
        speedup_over("torch"),
        at_least=1.0,
        contender="ours 8-bit",
        machine=EVERY_MACHINE,
    ),
    Target(
        "1B training step, peak memory",
        "train_step",
        memory_beside("bnb + PEFT"),
        model("llama-1b"),
        at_most=0.6,
        machine=EVERY_MACHINE,
    ),
)
