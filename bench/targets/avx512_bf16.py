"""Targets of machines with AVX512-BF16 and without AMX."""

from __future__ import annotations

from .formulas import fraction_of, speedup_over, time_of
from .rows import model, rows
from .target import AVX512_BF16, Target

TARGETS = (
    Target(
        "forward M 1..8 over bnb eval",
        "linear_nf4",
        speedup_over("bnb eval"),
        rows(1, 8),
        at_least=1.3,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M 1 cold over dense",
        "linear_nf4",
        speedup_over("dense"),
        rows(1, 1, mode="cold"),
        at_least=3.5,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M 16..128 over bnb eval",
        "linear_nf4",
        speedup_over("bnb eval"),
        rows(9, 255),
        at_least=1.0,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M 16..128 over bnb train",
        "linear_nf4",
        speedup_over("bnb train"),
        rows(9, 255),
        at_least=1.0,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M 16..128 over dense",
        "linear_nf4",
        speedup_over("dense"),
        rows(9, 255),
        at_least=0.9,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M >= 256, arithmetic", "linear_nf4", fraction_of("bf16"), rows(256), at_least=0.85, machine=AVX512_BF16
    ),
    Target(
        "forward M >= 256 over dense", "linear_nf4", speedup_over("dense"), rows(256), at_least=1.0, machine=AVX512_BF16
    ),
    Target(
        "forward M >= 256 over bnb eval",
        "linear_nf4",
        speedup_over("bnb eval"),
        rows(256),
        at_least=1.25,
        machine=AVX512_BF16,
    ),
    Target(
        "forward M >= 256 over bnb train",
        "linear_nf4",
        speedup_over("bnb train"),
        rows(256),
        at_least=1.3,
        machine=AVX512_BF16,
    ),
    Target(
        "forward + grad_x M 1024 over bnb train",
        "linear_nf4_grad_x",
        speedup_over("bnb train"),
        rows(1024),
        at_least=2.0,
        machine=AVX512_BF16,
    ),
    Target(
        "LoRA forward + backward over bnb + PEFT",
        "linear_nf4_lora",
        speedup_over("bnb + PEFT"),
        at_least=2.5,
        machine=AVX512_BF16,
    ),
    Target(
        "LoRA beside our plain layer",
        "linear_nf4_lora",
        time_of("ours without LoRA"),
        at_most=1.10,
        machine=AVX512_BF16,
    ),
    Target(
        "training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        model("SmolLM2-135M"),
        at_least=1.8,
        machine=AVX512_BF16,
    ),
    Target(
        "training step over dense + PEFT",
        "train_step",
        speedup_over("dense + PEFT"),
        model("SmolLM2-135M"),
        at_least=1.8,
        machine=AVX512_BF16,
    ),
    Target(
        "training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        model("SmolLM2-135M"),
        at_least=2.5,
        stretch=True,
        machine=AVX512_BF16,
    ),
    Target(
        "fused training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        model("SmolLM2-135M"),
        at_least=1.8,
        contender="ours, fused",
        machine=AVX512_BF16,
    ),
)
