"""Targets of machines with AMX."""

from __future__ import annotations

from .formulas import speedup_over, time_of
from .rows import large, model, small
from .target import AMX, Target

TARGETS = (
    Target(
        "AMX: fused training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        model("SmolLM2-135M"),
        at_least=2.2,
        contender="ours, fused",
        machine=AMX,
    ),
    Target(
        "AMX: fused training step over dense + PEFT",
        "train_step",
        speedup_over("dense + PEFT"),
        model("SmolLM2-135M"),
        at_least=2.0,
        contender="ours, fused",
        machine=AMX,
    ),
    Target(
        "AMX: 1B fused training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        model("llama-1b"),
        at_least=1.8,
        contender="ours, fused",
        machine=AMX,
    ),
    Target(
        "AMX: loss of an evaluation over dense logits",
        "evaluate",
        speedup_over("dense"),
        model("SmolLM2-135M"),
        at_least=4.0,
        contender="ours, fused",
        machine=AMX,
    ),
    Target(
        "AMX: forward M 1..64 over dense", "linear_nf4", speedup_over("dense"), large(1, 64), at_least=2.0, machine=AMX
    ),
    Target(
        "AMX: forward M 128..512 over dense",
        "linear_nf4",
        speedup_over("dense"),
        large(128, 512),
        at_least=1.5,
        machine=AMX,
    ),
    Target(
        "AMX: forward M 1024, 4096 over dense",
        "linear_nf4",
        speedup_over("dense"),
        large(1024),
        at_least=1.4,
        machine=AMX,
    ),
    Target(
        "AMX: forward on small layers over dense", "linear_nf4", speedup_over("dense"), small, at_least=1.0, machine=AMX
    ),
    Target("AMX: forward + grad_x over dense", "linear_nf4_grad_x", speedup_over("dense"), at_least=1.15, machine=AMX),
    Target(
        "AMX: LoRA beside our plain layer", "linear_nf4_lora", time_of("ours without LoRA"), at_most=1.06, machine=AMX
    ),
    Target(
        "AMX: training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        model("SmolLM2-135M"),
        at_least=1.3,
        machine=AMX,
    ),
    Target(
        "AMX: 1B training step over bnb + PEFT",
        "train_step",
        speedup_over("bnb + PEFT"),
        model("llama-1b"),
        at_least=1.5,
        machine=AMX,
    ),
    Target(
        "AMX: 1B training step over dense + PEFT",
        "train_step",
        speedup_over("dense + PEFT"),
        model("llama-1b"),
        at_least=1.5,
        machine=AMX,
    ),
    Target(
        "AMX: 1B prefill over dense",
        "generate",
        speedup_over("dense"),
        lambda row: row["M"] > 1,
        at_least=1.3,
        machine=AMX,
    ),
    Target(
        "AMX: 1B decoding over bnb",
        "generate",
        speedup_over("bnb"),
        lambda row: row["M"] == 1,
        at_least=1.2,
        machine=AMX,
    ),
)
