"""Claim `rslora`: rsLoRA keeps the gradient of high ranks and gains from them; LoRA's alpha / r does neither."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch

import qlora_kernels as qk
from qlora_kernels.training import TrainConfig

from ..markdown import table
from ..row_file import Row
from . import subject
from .claim import Claim, Finding, has_case
from .seeds import RULE, differences, mean_and_spread

RANKS = LOW, HIGH = (8, 64)
ALPHA = 16
SEEDS = (0, 1)
STEPS, LEARNING_RATE, WARMUP = 12, 1e-3, 2
WINDOWS = 8
"""Number of evaluated windows, half of those of the other claims."""
SCALINGS = {False: "alpha / r", True: "alpha / sqrt(r)"}


def cases(quick: bool) -> list[Row]:
    """Return both scalings at both ranks, seed by seed, so that an interrupted run can be judged."""
    return [
        {"use_rslora": use_rslora, "r": r, "seed": seed, "steps": 2 if quick else STEPS}
        for seed in ((0,) if quick else SEEDS)
        for use_rslora in SCALINGS
        for r in ((2, 4) if quick else RANKS)
    ]


def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Train LoRA over NF4 and measure the norms of the gradient and the perplexity on the unseen text."""
    for case in chosen:
        model = subject.model(quick)
        qk.replace_linear(model)
        torch.manual_seed(case["seed"])
        config = qk.peft.LoraConfig(
            r=case["r"], lora_alpha=ALPHA, use_rslora=case["use_rslora"], target_modules="all-linear"
        )
        adapted = subject.adapt(model, config)
        records = subject.fine_tune(
            adapted,
            TrainConfig(steps=case["steps"], batch_size=1, lr=LEARNING_RATE, warmup_steps=WARMUP, seed=case["seed"]),
            quick,
        )
        yield case | {
            "gradient_norm": round(statistics.mean(record.grad_norm for record in records), 5),
            "loss": round(statistics.mean(record.loss for record in records[-4:]), 4),
            "after": round(subject.perplexity_of(adapted, quick, windows=WINDOWS), 4),
            "trained": subject.trained_parameters(adapted),
        }


def show(rows: Sequence[Row]) -> str:
    """Return a table with one line per scaling and rank."""
    lines = []
    for use_rslora, scaling in SCALINGS.items():
        for r in sorted({row["r"] for row in rows}):
            chosen = [row for row in rows if has_case(row, {"use_rslora": use_rslora, "r": r})]
            if chosen:
                norms, after, loss = ([row[name] for row in chosen] for name in ("gradient_norm", "after", "loss"))
                lines.append(
                    [
                        scaling,
                        str(r),
                        mean_and_spread(norms, 3),
                        ", ".join(f"{value:.3f}" for value in after),
                        mean_and_spread(after, 3),
                        mean_and_spread(loss, 3),
                    ]
                )
    head = ["scaling", "r", "norm of the gradient, mean of all steps", "perplexity, one for each seed", "mean ± SD"]
    return table([*head, "training loss, last 4 steps"], lines)


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Compare r = 64 with r = 8 under both scalings."""
    findings = []
    ratios = {}
    for use_rslora in SCALINGS:
        norms = [
            [row["gradient_norm"] for row in rows if has_case(row, {"use_rslora": use_rslora, "r": r})] for r in RANKS
        ]
        if all(norms):
            ratios[use_rslora] = statistics.mean(norms[1]) / statistics.mean(norms[0])
    if len(ratios) == len(SCALINGS):
        findings.append(
            Finding(
                "rsLoRA",
                "The gradient shrinks with the rank under alpha / r and does not under alpha / sqrt(r)",
                ratios[False] < 0.5 and 0.5 <= ratios[True] <= 2,
                f"from r = {LOW} to {HIGH} its norm is multiplied by {ratios[False]:.2f} at alpha / r and by "
                f"{ratios[True]:.2f} at alpha / sqrt(r)",
            )
        )
    comparisons = (
        (
            f"With alpha / sqrt(r), r = {HIGH} reaches a lower perplexity than r = {LOW}",
            {"use_rslora": True, "r": HIGH},
            {"use_rslora": True, "r": LOW},
        ),
        (
            f"At r = {HIGH}, alpha / sqrt(r) reaches a lower perplexity than alpha / r",
            {"use_rslora": True, "r": HIGH},
            {"use_rslora": False, "r": HIGH},
        ),
    )
    for statement, better, worse in comparisons:
        if found := differences(rows, "after", better, worse):
            words = f"mean difference of perplexity {found.words(3)}"
            findings.append(Finding("rsLoRA", statement, found.is_below_zero(), words))
    if found := differences(rows, "after", {"use_rslora": False, "r": HIGH}, {"use_rslora": False, "r": LOW}):
        better_at_high = found.is_below_zero()
        findings.append(
            Finding(
                "rsLoRA",
                f"With alpha / r, r = {HIGH} does not reach a lower perplexity than r = {LOW}",
                None if better_at_high is None else not better_at_high,
                f"mean difference of perplexity {found.words(3)}",
            )
        )
    return findings


CLAIM = Claim(
    name="rslora",
    title="rsLoRA on a language model",
    source="rsLoRA (arXiv:2312.03732), section 4",
    method=(
        f"SmolLM2-135M in NF4 + DQ, LoRA with alpha = {ALPHA} on all linear layers but the head, {STEPS} steps of one "
        f"window of {subject.WINDOW} tokens of Python's language reference, AdamW with a learning rate of "
        f"{LEARNING_RATE:g} at every rank; perplexity on {WINDOWS} held-out windows. The norm is that of the gradient "
        f"of all adapters, before clipping to 1. {RULE}"
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
