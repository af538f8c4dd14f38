"""Claim `lowrank`: at low rank over NF4, DoRA, LoftQ and PiSSA train better than plain LoRA."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.peft.methods.lora_init import principal_factors
from qlora_kernels.peft.methods.lora_layers import LoraLinear
from qlora_kernels.training import TrainConfig

from ..markdown import table
from ..row_file import Row
from . import subject
from .claim import Claim, Finding, find, has_case
from .seeds import RULE, differences, mean_and_spread

LORA, DORA, LOFTQ, PISSA = METHODS = ("LoRA", "DoRA", "LoftQ", "PiSSA")
FROM_WEIGHTS = (LOFTQ, PISSA)
"""Methods whose initial values follow from the weights, without random numbers."""

RANKS = (2, 8)
SEEDS = (0, 1)
STEPS, LEARNING_RATE, WARMUP = 12, 1e-3, 2
WINDOWS = 8
"""Number of evaluated windows, half of those of the other claims."""
SVD_ITERATIONS = 16
"""Power iterations of the randomized SVD for PiSSA; its authors use 16 for large models."""


def cases(quick: bool) -> list[Row]:
    """Return every method at every rank, with the seeds of a method side by side."""
    ranks, seeds = ((2,), (0,)) if quick else (RANKS, SEEDS)
    return [
        {"method": method, "r": r, "seed": seed, "steps": 2 if quick else STEPS}
        for r in ranks
        for method in METHODS
        for seed in seeds
    ]


def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Train each method over NF4 and measure the perplexity before and after on the unseen text."""
    before: dict[tuple[str, int], float] = {}
    started: dict[tuple[str, int], nn.Module] = {}
    for case in chosen:
        method, r, seed = case["method"], case["r"], case["seed"]
        torch.manual_seed(seed)
        if method in FROM_WEIGHTS:
            if (method, r) not in started:
                started = {(method, r): start(method, r, quick)}
            adapted = copy.deepcopy(started[method, r])
        else:
            adapted = start(method, r, quick)
        base = (method, r) if method in FROM_WEIGHTS else ("NF4", 0)
        if base not in before:
            before[base] = subject.perplexity_of(adapted, quick, windows=WINDOWS)
        records = subject.fine_tune(
            adapted,
            TrainConfig(steps=case["steps"], batch_size=1, lr=LEARNING_RATE, warmup_steps=WARMUP, seed=seed),
            quick,
        )
        yield case | {
            "before": round(before[base], 4),
            "after": round(subject.perplexity_of(adapted, quick, windows=WINDOWS), 4),
            "loss": round(statistics.mean(record.loss for record in records[-4:]), 4),
            "trained": subject.trained_parameters(adapted),
        }


@torch.no_grad()
def start(method: str, r: int, quick: bool) -> qk.peft.PeftModel:
    """Return the model in NF4 with the method's adapter, whose random values follow torch's seed."""
    model = subject.model(quick)
    config = qk.peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", use_dora=method == DORA)
    if method == LOFTQ:
        # The base stays dense here: LoftQ quantizes it, and fits the adapter to the error.
        return subject.adapt(model, config.replace(init_lora_weights="loftq"))
    if method == PISSA:
        return _quantized_residual(model, config)
    qk.replace_linear(model)
    return subject.adapt(model, config)


def _quantized_residual(model: nn.Module, config: qk.peft.LoraConfig) -> qk.peft.PeftModel:
    """Return QPiSSA: the adapter holds each weight's principal part, and the base is the rest of the weight in NF4."""
    scaling = config.scaling(config.r, config.lora_alpha)
    factors = {}
    for name, layer in subject.linears(model).items():
        factors[name] = principal_factors(layer.weight.float() / scaling, config.r, SVD_ITERATIONS)
        lora_A, lora_B = factors[name]
        layer.weight.copy_(layer.weight - scaling * (lora_B @ lora_A))
    qk.replace_linear(model)
    adapted = subject.adapt(model, config)
    for name, (lora_A, lora_B) in factors.items():
        update = adapted.get_submodule(f"base_model.{name}.deltas.default")
        assert isinstance(update, LoraLinear)
        update.set_factors(lora_A, lora_B)
    return adapted


def show(rows: Sequence[Row]) -> str:
    """Return a table with one line per rank and method."""
    lines = []
    for r, method in dict.fromkeys((row["r"], row["method"]) for row in rows):
        chosen = sorted((row for row in rows if has_case(row, {"r": r, "method": method})), key=lambda row: row["seed"])
        lines.append(
            [
                str(r),
                method,
                f"{chosen[0]['trained']:,}",
                f"{chosen[0]['before']:.3f}",
                ", ".join(f"{row['after']:.3f}" for row in chosen),
                mean_and_spread([row["after"] for row in chosen], 3),
                mean_and_spread([row["loss"] for row in chosen], 3),
            ]
        )
    head = ["r", "method", "trained parameters", "perplexity before", "after, one for each seed", "mean ± SD"]
    return table([*head, "training loss, last 4 steps"], lines)


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Judge the initial perplexity, and every method against LoRA of the same rank after training."""
    findings = []
    for method in FROM_WEIGHTS:
        found = {r: (find(rows, method=method, r=r), find(rows, method=LORA, r=r)) for r in RANKS}
        pairs = {r: (own["before"], lora["before"]) for r, (own, lora) in found.items() if own and lora}
        if pairs:
            words = ", ".join(f"{own:.3f} and {nf4:.3f} at r = {r}" for r, (own, nf4) in pairs.items())
            ranks = " and ".join(map(str, pairs))
            findings.append(
                Finding(
                    method,
                    f"Before training, {method} has a lower perplexity than NF4 with a zero adapter, r = {ranks}",
                    all(own < nf4 for own, nf4 in pairs.values()),
                    f"perplexity {words}",
                )
            )
    for method, other in ((DORA, LORA), (LOFTQ, LORA), (PISSA, LORA), (PISSA, LOFTQ)):
        findings += _compare(rows, method, other)
    return findings


def _compare(rows: Sequence[Row], method: str, other: str) -> list[Finding]:
    """Return whether a method is better at every rank; None if the seeds leave that open at one of them."""
    found = {
        r: differences(rows, "after", {"method": method, "r": r}, {"method": other, "r": r})
        for r in dict.fromkeys(row["r"] for row in rows)
    }
    decided = {r: of.is_below_zero() for r, of in found.items() if of}
    if not decided:
        return []
    holds = False if False in decided.values() else all(decided.values()) or None
    words = "; ".join(f"r = {r}: {of.words(3)}" for r, of in found.items() if of)
    ranks = " and ".join(map(str, decided))
    statement = f"{method} reaches a lower perplexity than {other} after the same training, both with r = {ranks}"
    return [Finding(method, statement, holds, f"mean difference of perplexity at {words}")]


CLAIM = Claim(
    name="lowrank",
    title="DoRA, LoftQ and PiSSA at low rank, trained",
    source=(
        "DoRA (arXiv:2402.09353), section 5, robustness to rank; LoftQ (arXiv:2310.08659), section 4; "
        "PiSSA (arXiv:2404.02948), QPiSSA"
    ),
    method=(
        f"SmolLM2-135M in NF4 + DQ, adapters on all linear layers but the head with alpha = 2 r, {STEPS} steps of one "
        f"window of {subject.WINDOW} tokens of Python's language reference, AdamW with a learning rate of "
        f"{LEARNING_RATE:g} for all; perplexity on {WINDOWS} held-out windows. LoRA and DoRA start from NF4 of the "
        'weight, `init_lora_weights="loftq"` from one iteration of LoftQ, and PiSSA from the principal part of the '
        "weight over NF4 of the rest (one iteration). The seed sets the order of the text, and the random values of "
        f"LoRA and DoRA. {RULE} The papers train larger models for thousands of steps and choose the learning rate. At "
        "the same rate PiSSA's first steps change a weight more than LoRA's, whose B starts from zero."
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
