"""Learning rates of the classification task, chosen on seeds and reviews that the claims do not use.

It has the form of a claim and no statements: its part of the page shows how the rates were chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from python.examples.compare_methods import RECIPES

from ..markdown import table
from ..row_file import Row
from . import sentiment
from .claim import Claim, find

SEEDS = FIRST, SECOND = (3, 4)
GRID: dict[str, dict[float, tuple[int, ...]]] = {
    "houlsby": {1e-3: SEEDS, 5e-4: SEEDS, 3e-4: (FIRST,)},
    "bitfit": {1e-2: (FIRST,), 3e-3: SEEDS, 2e-3: SEEDS, 1e-3: (FIRST,)},
    "prefix": {1e-3: (FIRST,), 5e-4: SEEDS, 2e-4: (FIRST,)},
}
"""Name of a recipe -> learning rate -> the seeds with which it is tried."""

MARGIN = 4
"""Points of accuracy below the best rate of the FIRST seed within which a rate is tried with the SECOND, too."""

CHOSEN = {"houlsby": 5e-4, "bitfit": 2e-3, "prefix": 5e-4}
"""Name of a recipe -> the rate of GRID whose lower accuracy over both seeds is the highest."""


def rate(method: str) -> float:
    """Return the learning rate with which a claim trains a recipe: the chosen one, or the recipe's own."""
    return CHOSEN.get(method, RECIPES[method].lr)


def cases(quick: bool) -> list[Row]:
    """Return a case for each method, learning rate and seed."""
    steps = sentiment.QUICK_STEPS if quick else sentiment.STEPS
    every = [
        {"method": method, "lr": lr, "seed": seed, "steps": steps}
        for method, rates in GRID.items()
        for lr, seeds in rates.items()
        for seed in seeds
    ]
    return every[:1] if quick else every


def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Train with each rate and measure the accuracy on validation reviews, in percent."""
    for case in chosen:
        _, accuracy = sentiment.fine_tune(RECIPES[case["method"]], case["seed"], quick, case["lr"])
        yield case | {"accuracy": round(100 * accuracy, 3)}


def best(rows: Sequence[Row], method: str) -> float:
    """Return the rate whose lower accuracy is the highest, of those that have a row for each seed."""
    lowest = {}
    for lr in GRID[method]:
        found = [find(rows, method=method, lr=lr, seed=seed) for seed in SEEDS]
        if all(found):
            lowest[lr] = min(row["accuracy"] for row in found if row)
    return max(lowest, key=lambda lr: lowest[lr])


def show(rows: Sequence[Row]) -> str:
    """Return a table with a line for each method and learning rate."""
    lines = []
    for method, rates in GRID.items():
        for lr in rates:
            found = [find(rows, method=method, lr=lr, seed=seed) for seed in SEEDS]
            if any(found):
                marks = [words for words, is_so in _notes(method, lr) if is_so]
                cells = [f"{row['accuracy']:.1f}" if row else "" for row in found]
                lines.append([method, f"{lr:g}", *cells, ", ".join(marks)])
    return table(["method", "learning rate", *(f"accuracy %, seed {seed}" for seed in SEEDS), ""], lines)


def _notes(method: str, lr: float) -> Iterator[tuple[str, bool]]:
    yield "chosen", lr == CHOSEN[method]
    yield "the example's", lr == RECIPES[method].lr


CLAIM = Claim(
    name="rates",
    title="Learning rates of the classification task",
    source="not a claim of a paper: a rate with which a method does not learn would say nothing about the method",
    method=(
        "For the three methods of which a run of the classification below stayed at chance with the learning rate of "
        "`python/examples/compare_methods.py`, which has larger batches. Each rate trains as below, with other seeds, "
        f"and is scored on {sentiment.VALIDATION} validation reviews, which no claim uses. All rates are tried with "
        f"seed {FIRST}, those within {MARGIN} points of the best with seed {SECOND}, too; the rate whose lower "
        "accuracy is the highest is chosen. The other methods learn in all runs with the example's rates and keep "
        "them, without a search. With the chosen rates the adapters learn in all runs below. One run of BitFit and one "
        "of prefix tuning still stay at chance, and lower and higher rates are both worse: these steps are too few for "
        "the two, and their statements are not decided."
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=lambda rows: [],
)
