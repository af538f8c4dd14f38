"""Claim `finetuning`: after the same training, LoRA over NF4 is as good as over 16-bit weights, and DoRA beats LoRA."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch

import qlora_kernels as qk
from qlora_kernels.training import TrainConfig

from ..markdown import table
from ..row_file import Row
from . import subject
from .claim import Claim, Finding
from .seeds import RULE, differences, mean_and_spread
from .subject import LANGUAGE_REFERENCE, MOVIE_REVIEWS

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
TOLERANCE = 0.02
"""Share of the perplexity of LoRA over 16-bit weights within which LoRA over NF4 counts as equal."""


def cases(quick: bool) -> list[Row]:
    """Return the cases by comparison, both sides seed by seed, so that an interrupted run can be judged."""
    if quick:
        comparisons: tuple[tuple[str, tuple[str, str]], ...] = ((LANGUAGE_REFERENCE, (SIXTEEN, FOUR)),)
    else:
        comparisons = (
            (LANGUAGE_REFERENCE, (SIXTEEN, FOUR)),
            (LANGUAGE_REFERENCE, (LORA, DORA)),
            (MOVIE_REVIEWS, (SIXTEEN, FOUR)),
        )
    return [
        {"data": data, "variant": name, "seed": seed, "steps": 2 if quick else STEPS}
        for data, pair in comparisons
        for seed in ((0,) if quick else SEEDS)
        for name in pair
    ]


def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Train each variant from the same base and measure its perplexity on the unseen part of its text."""
    before: dict[tuple[bool, str], float] = {}  # one measurement per base and text, independent of the seed
    for case in chosen:
        quantized, config = VARIANTS[case["variant"]]
        data, seed = case["data"], case["seed"]
        model = subject.model(quick)
        if quantized:
            qk.replace_linear(model)
        if (quantized, data) not in before:
            before[quantized, data] = subject.perplexity_of(model, quick, data)
        torch.manual_seed(seed)
        adapted = subject.adapt(model, config)
        records = subject.fine_tune(
            adapted,
            TrainConfig(steps=case["steps"], batch_size=EXAMPLES, lr=LEARNING_RATE, warmup_steps=WARMUP, seed=seed),
            quick,
            data,
        )
        yield case | {
            "before": round(before[quantized, data], 4),
            "after": round(subject.perplexity_of(adapted, quick, data), 4),
            "last_loss": round(records[-1].loss, 4),
            "trained": subject.trained_parameters(adapted),
        }


def show(rows: Sequence[Row]) -> str:
    """Return a table with one line per text and variant, and the seeds side by side."""
    lines = []
    for data, name in dict.fromkeys((row["data"], row["variant"]) for row in rows):
        chosen = [row for row in rows if (row["data"], row["variant"]) == (data, name)]
        chosen.sort(key=lambda row: row["seed"])
        after = [row["after"] for row in chosen]
        lines.append(
            [
                data,
                name,
                f"{chosen[0]['trained']:,}",
                f"{chosen[0]['before']:.3f}",
                ", ".join(f"{value:.3f}" for value in after),
                mean_and_spread(after, 3),
            ]
        )
    head = ["text", "variant", "trained parameters", "perplexity before", "after, one for each seed", "mean ± SD"]
    return table(head, lines)


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Compare the variants over their common seeds with the spread between seeds, for each text."""
    findings = []
    for data in dict.fromkeys(row["data"] for row in rows):
        of = [row for row in rows if row["data"] == data]
        if found := differences(of, "after", {"variant": FOUR}, {"variant": SIXTEEN}):
            sixteen = statistics.mean(row["after"] for row in of if row["variant"] == SIXTEEN)
            gap = differences(of, "before", {"variant": FOUR}, {"variant": SIXTEEN})
            findings.append(
                Finding(
                    "QLoRA",
                    f"LoRA over NF4 + DQ reaches the perplexity of LoRA over 16-bit weights on the {data}",
                    found.is_at_most(TOLERANCE * sixteen),
                    f"mean difference of perplexity {found.words(3)}"
                    + (f"; before training the difference was {gap.mean:+.3f}" if gap else ""),
                )
            )
        if found := differences(of, "after", {"variant": DORA}, {"variant": LORA}):
            findings.append(
                Finding(
                    "DoRA",
                    f"DoRA reaches a lower perplexity than LoRA of the same rank on the {data}",
                    found.is_below_zero(),
                    f"mean difference of perplexity {found.words(3)}",
                )
            )
    return findings


CLAIM = Claim(
    name="finetuning",
    title="QLoRA against 16-bit LoRA, and DoRA against LoRA, after the same training",
    source="QLoRA (arXiv:2305.14314), section 4; DoRA (arXiv:2402.09353), section 5",
    method=(
        f"SmolLM2-135M, adapters on all linear layers but the head, {STEPS} steps of {EXAMPLES} x {subject.WINDOW} "
        f"tokens, AdamW with a learning rate of {LEARNING_RATE:g}; perplexity on held-out documents of the same text. "
        "The texts are Python's language reference, as in the demo, and reviews of IMDB (package movie-reviews). "
        f"{RULE} LoRA over NF4 counts as equal where it is within {TOLERANCE:.0%}. This is far shorter than the "
        "papers' training."
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
