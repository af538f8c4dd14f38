"""Claim `adalora`: with the same final number of triplets, ranks that AdaLoRA distributes beat LoRA's equal ranks."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from python.examples.compare_methods import RECIPES, TASK, adalora, once
from qlora_kernels import peft

from ..markdown import table
from ..row_file import Row
from . import sentiment
from .claim import Claim, Finding
from .seeds import RULE, Differences, differences, mean_and_spread

LORA, ADALORA = METHODS = ("LoRA, r = 8", "AdaLoRA, r = 12 to 8")
TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
"""The six linear layers of each block: query, key, value, the output of attention, and both of the MLP."""

RECIPE = {
    LORA: once(
        RECIPES["lora"].lr,
        lambda steps: peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type=TASK),
    ),
    ADALORA: once(RECIPES["adalora"].lr, lambda steps: adalora(steps).replace(target_modules=TARGETS)),
}

PICTURE = "![Final ranks of AdaLoRA by block and kind of layer](assets/adalora-ranks.svg)"


def cases(quick: bool) -> list[Row]:
    """Return both methods, seed by seed."""
    return sentiment.cases(METHODS, quick)


def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Train both methods; measure the accuracy in percent and the final rank of each layer."""
    for case in chosen:
        model, accuracy = sentiment.fine_tune(RECIPE[case["method"]], case["seed"], quick)
        row = case | {"accuracy": round(100 * accuracy, 3)}
        if case["method"] == ADALORA:
            row["ranks"] = peft.adalora_ranks(model)
        yield row


def kind(layer: str) -> str:
    """Return a layer's name without the path of its block, such as `attention.self.query`."""
    return layer.partition(".layer.")[2].partition(".")[2]


def block(layer: str) -> int:
    """Return the number of a layer's block."""
    return int(layer.partition(".layer.")[2].partition(".")[0])


def is_mlp(layer: str) -> bool:
    """Whether a layer belongs to the MLP of its block."""
    return not kind(layer).startswith("attention")


def mean_ranks(rows: Sequence[Row]) -> dict[str, float]:
    """Return the mean final rank over the seeds for each layer."""
    ranks = [row["ranks"] for row in rows if "ranks" in row]
    return {layer: statistics.mean(of[layer] for of in ranks) for layer in ranks[0]} if ranks else {}


def show(rows: Sequence[Row]) -> str:
    """Return a table with one line per method, and the picture of the ranks."""
    lines = []
    for method in METHODS:
        chosen = sorted((row for row in rows if row["method"] == method), key=lambda row: row["seed"])
        if chosen:
            accuracies = [row["accuracy"] for row in chosen]
            each = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
            ranks = list(mean_ranks(chosen).values()) or [8]
            lines.append([method, f"{min(ranks):.1f} to {max(ranks):.1f}", each, mean_and_spread(accuracies, 1)])
    shown = table(["method", "final ranks", "accuracy %, one for each seed", "mean ± SD"], lines)
    return f"{shown}\n\n{PICTURE}" if mean_ranks(rows) else shown


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Compare the accuracies, and the ranks of parts of the model, over the seeds."""
    findings = []
    if found := differences(rows, "accuracy", {"method": LORA}, {"method": ADALORA}):
        findings.append(
            Finding(
                "AdaLoRA",
                "AdaLoRA reaches a higher accuracy than LoRA with the same final number of trained weights",
                found.is_below_zero(),
                f"points below LoRA: {found.words(1)}",
            )
        )
    ranks = [row["ranks"] for row in rows if "ranks" in row]
    if ranks:
        middle = max(map(block, ranks[0])) / 2
        parts = (
            ("the MLPs", "attention", is_mlp),
            ("the upper blocks", "the lower ones", lambda layer: block(layer) > middle),
        )
        for more, less, chosen in parts:
            means = [
                [statistics.mean(rank for layer, rank in of.items() if chosen(layer) == of_part) for of in ranks]
                for of_part in (False, True)
            ]
            found = Differences(tuple(low - high for low, high in zip(*means, strict=True)))
            words = f"mean rank {statistics.mean(means[1]):.2f} in {more} and {statistics.mean(means[0]):.2f} in {less}"
            findings.append(
                Finding(
                    "AdaLoRA",
                    f"AdaLoRA gives {more} higher ranks than {less}",
                    found.is_below_zero(),
                    f"{words}; {less} minus {more}: {found.words(2)}",
                )
            )
    return findings


CLAIM = Claim(
    name="adalora",
    title="AdaLoRA against LoRA of equal budget",
    source="AdaLoRA (arXiv:2303.10512), section 4.1 and the ranks of section 4.5",
    method=(
        f"{sentiment.METHOD} LoRA has rank 8 on the six linear layers of each block; AdaLoRA starts there with rank 12 "
        "and ends with a mean rank of 8, after pruning from a tenth to two thirds of the steps. The learning rates are "
        f"{RECIPES['lora'].lr:g} and {RECIPES['adalora'].lr:g}. The picture shows the final ranks, mean of the seeds. "
        f"{RULE}"
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
