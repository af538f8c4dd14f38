"""Claim `classification`: PEFT methods reach the accuracy of full fine-tuning on a classification task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from python.examples.compare_methods import RECIPES

from ..markdown import table
from ..row_file import Row
from . import rates, sentiment
from .claim import Claim, Finding
from .seeds import RULE, differences, mean_and_spread

FULL = "full"
METHODS = {
    FULL: "full fine-tuning",
    "lora": "LoRA, r = 16",
    "houlsby": "adapters, Houlsby",
    "bitfit": "BitFit",
    "prefix": "prefix tuning",
    "p-tuning-v2": "P-Tuning v2",
}
"""Name of a recipe -> its name on the page."""

PAPERS = {
    "lora": ("LoRA", "LoRA reaches the accuracy of full fine-tuning"),
    "houlsby": ("Adapters", "Adapters reach the accuracy of full fine-tuning within 0.4 points"),
    "bitfit": ("BitFit", "On small and medium data BitFit is competitive with full fine-tuning"),
    "prefix": ("Prefix tuning", "Prefix tuning is comparable with full fine-tuning"),
    "p-tuning-v2": ("P-Tuning v2", "P-Tuning v2 matches full fine-tuning at every model size"),
}
"""Name of a recipe -> the paper and what its abstract says."""

TOLERANCE = {"houlsby": 0.4}
CHANCE = 55.0
"""Accuracy in percent below which a run has not learned; it says more about the learning rate than about the method."""

DEFAULT_TOLERANCE = 2.0
"""Points of accuracy below full fine-tuning within which a method counts as equal."""


def cases(quick: bool) -> list[Row]:
    """Return all methods with their learning rates, seed by seed."""
    return [{**case, "lr": rates.rate(case["method"])} for case in sentiment.cases(METHODS, quick)]


def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Train each method and measure its accuracy on test reviews, in percent."""
    for case in chosen:
        model, accuracy = sentiment.fine_tune(RECIPES[case["method"]], case["seed"], quick, case["lr"])
        yield case | {"accuracy": round(100 * accuracy, 3), "trained": model.get_nb_trainable_parameters()[0]}


def show(rows: Sequence[Row]) -> str:
    """Return a table with one line per method and learning rate, the highest mean first."""
    lines = []
    for method, lr in dict.fromkeys((row["method"], row["lr"]) for row in rows):
        chosen = sorted(
            (row for row in rows if (row["method"], row["lr"]) == (method, lr)), key=lambda row: row["seed"]
        )
        accuracies = [row["accuracy"] for row in chosen]
        each = ", ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        words = f"{lr:g}" if lr == rates.rate(method) else f"{lr:g}, not chosen"
        line = [METHODS[method], words, f"{chosen[0]['trained']:,}", each, mean_and_spread(accuracies, 1)]
        lines.append((sum(accuracies) / len(accuracies), line))
    lines.sort(key=lambda pair: -pair[0])
    return table(
        ["method", "learning rate", "trained weights", "accuracy %, one for each seed", "mean ± SD"],
        [line for _, line in lines],
    )


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Compare each method with full fine-tuning over their common seeds, both with their chosen learning rates."""
    rows = [row for row in rows if row["lr"] == rates.rate(row["method"])]
    findings = []
    for method, (paper, statement) in PAPERS.items():
        lost = differences(rows, "accuracy", {"method": FULL}, {"method": method})
        if lost:
            holds = lost.is_at_most(TOLERANCE.get(method, DEFAULT_TOLERANCE))
            words = f"points below full fine-tuning: {lost.words(1)}"
            failed = sum(row["accuracy"] < CHANCE for row in rows if row["method"] == method)
            if failed:
                holds, words = None, f"{words}; runs that did not learn: {failed}"
            findings.append(Finding(paper, statement, holds, words))
    return findings


CLAIM = Claim(
    name="classification",
    title="Order of merit of PEFT methods on a classification task",
    source=(
        "abstracts of LoRA (arXiv:2106.09685), Adapters (arXiv:1902.00751), BitFit (arXiv:2106.10199), prefix tuning "
        "(arXiv:2101.00190, which measures generation) and P-Tuning v2 (arXiv:2110.07602)"
    ),
    method=(
        f"{sentiment.METHOD} {RULE} A method that is not below full fine-tuning by such a difference counts as equal "
        f"if the whole interval stays below {DEFAULT_TOLERANCE:g} points (adapters: 0.4, as their abstract states). "
        "The learning rates are those of the section above; lines with another rate are shown and "
        f"not judged. A method with a run that stays at chance (below {CHANCE:g} %) is not judged either, because such "
        "a run is about the training and not about the method. The papers train larger models to convergence."
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
