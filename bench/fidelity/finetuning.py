"""Claim `finetuning`: after the same training, LoRA over NF4 is as good as over 16-bit weights, and DoRA beats LoRA."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch

import qlora_kernels as qk
from qlora_kernels.training import ChunkedLoss, TrainConfig, train

from ..markdown import table
from ..row_file import Row
from . import subject
from .claim import Claim, Finding

VARIANTS: dict[str, tuple[bool, qk.peft.LoraConfig]] = {
    "LoRA r=16, bf16 base": (False, qk.peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")),
    "LoRA r=16, NF4 + DQ base": (True, qk.peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")),
    "LoRA r=4, NF4 + DQ base": (True, qk.peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")),
    "DoRA r=4, NF4 + DQ base": (
        True,
        qk.peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    ),
}
"""Name -> (whether the base is quantized, the adapter)."""

SIXTEEN, FOUR, LORA, DORA = VARIANTS
SEEDS = (0, 1, 2)
STEPS, EXAMPLES, LEARNING_RATE, WARMUP = 20, 2, 1e-3, 3


def cases(quick: bool) -> list[Row]:
    """Return the cases by comparison, both sides seed by seed, so that an interrupted run can be judged."""
    seeds, pairs = ((0,), ((SIXTEEN, FOUR),)) if quick else (SEEDS, ((SIXTEEN, FOUR), (LORA, DORA)))
    return [
        {"variant": name, "seed": seed, "steps": 2 if quick else STEPS}
        for pair in pairs
        for seed in seeds
        for name in pair
    ]


def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Train each variant from the same base and measure its perplexity on the unseen text."""
    before: dict[bool, float] = {}  # one measurement per base, independent of the seed
    for case in chosen:
        quantized, config = VARIANTS[case["variant"]]
        model = subject.model(quick)
        if quantized:
            qk.replace_linear(model)
        if quantized not in before:
            before[quantized] = subject.perplexity_of(model, quick)
        torch.manual_seed(case["seed"])
        adapted = qk.peft.get_peft_model(
            qk.peft.prepare_for_training(model, upcast="none", gradient_checkpointing=False), config
        )
        records = train(
            ChunkedLoss(adapted),
            subject.text(quick).train,
            lambda trained: torch.optim.AdamW(trained, lr=LEARNING_RATE),
            TrainConfig(
                steps=case["steps"], batch_size=EXAMPLES, lr=LEARNING_RATE, warmup_steps=WARMUP, seed=case["seed"]
            ),
        )
        yield case | {
            "before": round(before[quantized], 4),
            "after": round(subject.perplexity_of(adapted, quick), 4),
            "last_loss": round(records[-1].loss, 4),
            "trained": sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad),
        }


def show(rows: Sequence[Row]) -> str:
    """Return a table with one line per variant and one column per seed."""
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        chosen = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["seed"])
        after = [row["after"] for row in chosen]
        lines.append(
            [
                name,
                f"{chosen[0]['trained']:,}",
                f"{chosen[0]['before']:.3f}",
                ", ".join(f"{value:.3f}" for value in after),
                f"{statistics.mean(after):.3f}",
            ]
        )
    return table(["variant", "trained parameters", "perplexity before", "after, one for each seed", "mean"], lines)


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Compare means over the common seeds of two sides with the spread between seeds."""
    return [
        *_compare(rows, FOUR, SIXTEEN, "LoRA over NF4 + DQ reaches the perplexity of LoRA over 16-bit weights"),
        *_compare(rows, DORA, LORA, "DoRA reaches a lower perplexity than LoRA of the same rank", better=True),
    ]


def _compare(rows: Sequence[Row], name: str, other: str, statement: str, *, better: bool = False) -> list[Finding]:
    after = {(row["variant"], row["seed"]): row["after"] for row in rows}
    seeds = [seed for seed in SEEDS if (name, seed) in after and (other, seed) in after]
    if not seeds:
        return []
    differences = [after[name, seed] - after[other, seed] for seed in seeds]
    mean = statistics.mean(differences)
    spread = statistics.stdev(differences) if len(seeds) > 1 else None
    words = f"mean difference of perplexity {mean:+.3f} over {len(seeds)} seeds"
    holds = None
    if spread is not None:
        words += f", standard deviation {spread:.3f}"
        error = 2 * spread / len(seeds) ** 0.5
        holds = mean < -error if better else mean <= error
        if better and abs(mean) <= error:
            holds = None
    return [Finding(statement, holds, words)]


CLAIM = Claim(
    name="finetuning",
    title="QLoRA against 16-bit LoRA, and DoRA against LoRA, after the same training",
    source="QLoRA (arXiv:2305.14314), section 4; DoRA (arXiv:2402.09353), section 5",
    method=(
        f"SmolLM2-135M, adapters on all linear layers but the head, {STEPS} steps of {EXAMPLES} x {subject.WINDOW} "
        f"tokens of Python's language reference, AdamW with a learning rate of {LEARNING_RATE:g}; perplexity on the "
        "unseen text of the demo. A difference counts where it exceeds two standard errors over the seeds. This is far "
        "shorter than the papers' training."
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
