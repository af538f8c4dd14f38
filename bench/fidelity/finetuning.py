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
        data = case["data"]
        model = subject.model(quick)
        if quantized:
            qk.replace_linear(model)
        if (quantized, data) not in before:
            before[quantized, data] = subject.perplexity_of(model, quick, data)
        torch.manual_seed(case["seed"])
        adapted = qk.peft.get_peft_model(
            qk.peft.prepare_for_training(model, upcast="none", gradient_checkpointing=False), config
        )
        records = train(
            ChunkedLoss(adapted),
            subject.text(quick, data).train,
            lambda trained: torch.optim.AdamW(trained, lr=LEARNING_RATE),
            TrainConfig(
                steps=case["steps"], batch_size=EXAMPLES, lr=LEARNING_RATE, warmup_steps=WARMUP, seed=case["seed"]
            ),
        )
        yield case | {
            "before": round(before[quantized, data], 4),
            "after": round(subject.perplexity_of(adapted, quick, data), 4),
            "last_loss": round(records[-1].loss, 4),
            "trained": sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad),
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
                f"{statistics.mean(after):.3f}",
            ]
        )
    head = ["text", "variant", "trained parameters", "perplexity before", "after, one for each seed", "mean"]
    return table(head, lines)


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Compare the means of two sides over their common seeds with the spread between seeds, for each text."""
    findings = []
    for data in dict.fromkeys(row["data"] for row in rows):
        of = [row for row in rows if row["data"] == data]
        same = f"LoRA over NF4 + DQ reaches the perplexity of LoRA over 16-bit weights on the {data}"
        lower = f"DoRA reaches a lower perplexity than LoRA of the same rank on the {data}"
        findings += [*_compare(of, FOUR, SIXTEEN, same), *_compare(of, DORA, LORA, lower, better=True)]
    return findings


def _compare(rows: Sequence[Row], name: str, other: str, statement: str, *, better: bool = False) -> list[Finding]:
    """Judge whether `name` is as good as `other`, or with `better` whether its perplexity is lower."""
    found = {(row["variant"], row["seed"]): row for row in rows}
    seeds = [seed for seed in SEEDS if (name, seed) in found and (other, seed) in found]
    if not seeds:
        return []
    differences = [found[name, seed]["after"] - found[other, seed]["after"] for seed in seeds]
    mean = statistics.mean(differences)
    words = f"mean difference of perplexity {mean:+.3f} over {len(seeds)} seeds"
    holds = None
    if len(seeds) > 1:
        spread = statistics.stdev(differences)
        words += f", standard deviation {spread:.3f}"
        error = 2 * spread / len(seeds) ** 0.5
        holds = mean < -error if better else mean <= error
        if better and abs(mean) <= error:
            holds = None
    gap = found[name, seeds[0]]["before"] - found[other, seeds[0]]["before"]
    if abs(gap) > 0.01:
        words += f"; before training the difference was {gap:+.3f}"
    return [Finding(statement, holds, words)]


CLAIM = Claim(
    name="finetuning",
    title="QLoRA against 16-bit LoRA, and DoRA against LoRA, after the same training",
    source="QLoRA (arXiv:2305.14314), section 4; DoRA (arXiv:2402.09353), section 5",
    method=(
        f"SmolLM2-135M, adapters on all linear layers but the head, {STEPS} steps of {EXAMPLES} x {subject.WINDOW} "
        f"tokens, AdamW with a learning rate of {LEARNING_RATE:g}; perplexity on held-out documents of the same text. "
        "The texts are Python's language reference, as in the demo, and reviews of IMDB (package movie-reviews). A "
        "difference counts where it exceeds two standard errors over the seeds. This is far shorter than the papers' "
        "training."
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
