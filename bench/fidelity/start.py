"""Claim `start`: PiSSA and LoftQ start closer to the 16-bit weight than NF4 with a zero adapter."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qlora_kernels.peft.methods.lora_init import principal_factors

from ..markdown import table
from ..row_file import Row
from . import subject
from .claim import Claim, Finding
from .codes import DOUBLE_QUANTIZED, rounded

LAYERS = (
    *("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"),
    *("model.layers.15.self_attn.o_proj", "model.layers.15.mlp.up_proj"),
    *("model.layers.29.self_attn.v_proj", "model.layers.29.mlp.gate_proj"),
)
RANKS = (4, 16, 64)
ITERATIONS = (1, 5)
"""Iterations of alternating quantization and fitting; both papers use 1 and 5."""


def cases(quick: bool) -> list[Row]:
    """Return six layers of different kind and depth, at low and middle ranks."""
    layers, ranks = (("model.layers.0.self_attn.q_proj",), (4,)) if quick else (LAYERS, RANKS)
    return [{"layer": layer, "r": r} for layer in layers for r in ranks]


@torch.no_grad()
def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Measure the share of NF4's error that remains, in the nuclear and in the Frobenius norm."""
    if not chosen:
        return
    layers = subject.linears(subject.model(quick))
    for case in chosen:
        weight = layers[case["layer"]].weight.float()
        starts = {"NF4": weight - _nf4(weight)}
        for iterations in ITERATIONS:
            starts[f"LoftQ, {iterations}"] = weight - _alternate(
                weight, torch.zeros_like(weight), case["r"], iterations
            )
            principal = _low_rank(weight, case["r"])
            starts[f"PiSSA, {iterations}"] = weight - _alternate(weight, principal, case["r"], iterations)
        norms = {name: (torch.linalg.svdvals(error).sum(), error.norm()) for name, error in starts.items()}
        nuclear, frobenius = norms.pop("NF4")
        yield case | {
            "nuclear": {name: round((of / nuclear).item(), 4) for name, (of, _) in norms.items()},
            "frobenius": {name: round((of / frobenius).item(), 4) for name, (_, of) in norms.items()},
        }


def _alternate(weight: Tensor, low_rank: Tensor, r: int, iterations: int) -> Tensor:
    """Return NF4(W - L) + L after `iterations` rounds of quantizing W - L and fitting L to W - NF4(W - L).

    low_rank: the first L: zero for LoftQ, the principal part of W for PiSSA, whose first round keeps it.
    """
    starts_principal = bool(low_rank.any())
    for iteration in range(iterations):
        base = _nf4(weight - low_rank)
        if iteration > 0 or not starts_principal:
            low_rank = _low_rank(weight - base, r)
    return base + low_rank


def _low_rank(weight: Tensor, r: int) -> Tensor:
    lora_A, lora_B = principal_factors(weight, r)
    return lora_B @ lora_A


def _nf4(weight: Tensor) -> Tensor:
    return rounded(weight, DOUBLE_QUANTIZED, 64)


def _means(rows: Sequence[Row], r: int, norm: str) -> dict[str, float]:
    """Return the mean over the layers of the remaining share of NF4's error."""
    chosen = [row for row in rows if row["r"] == r]
    return {name: statistics.mean(row[norm][name] for row in chosen) for name in chosen[0][norm]}


def show(rows: Sequence[Row]) -> str:
    """Return a table of means over the layers, one line per rank."""
    names = list(rows[0]["nuclear"])
    lines = []
    for r in sorted({row["r"] for row in rows}):
        nuclear, frobenius = _means(rows, r, "nuclear"), _means(rows, r, "frobenius")
        lines.append([str(r), *(f"{nuclear[name]:.1%} ({frobenius[name]:.1%})" for name in names)])
    return table(["r", *(f"{name} iteration{'s' if name[-1] != '1' else ''}" for name in names)], lines)


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Judge each start at each rank in the nuclear norm, which PiSSA's paper uses."""
    findings = []
    ranks = sorted({row["r"] for row in rows})
    means = {r: _means(rows, r, "nuclear") for r in ranks}

    def words(name: str) -> str:
        return "remaining error at r = " + ", ".join(f"{r}: {means[r][name]:.1%}" for r in ranks)

    for paper, name in (("LoftQ", "LoftQ, 5"), ("PiSSA", "PiSSA, 5")):
        statement = f"{paper} with 5 iterations starts closer to W than NF4 with a zero adapter"
        findings.append(Finding(paper, statement, all(row["nuclear"][name] < 1 for row in rows), words(name)))
    better = all(means[r]["PiSSA, 5"] <= means[r]["LoftQ, 5"] for r in ranks)
    findings.append(
        Finding(
            "PiSSA",
            "PiSSA reduces the error more than LoftQ, both with 5 iterations",
            better,
            "remaining error, PiSSA and LoftQ, at r = "
            + ", ".join(f"{r}: {means[r]['PiSSA, 5']:.1%} and {means[r]['LoftQ, 5']:.1%}" for r in ranks),
        )
    )
    return findings


CLAIM = Claim(
    name="start",
    title="Initial error of PiSSA and LoftQ over NF4",
    source="LoftQ (arXiv:2310.08659), section 3; PiSSA (arXiv:2404.02948), QPiSSA and its quantization error",
    method=(
        "No training. For six layers of SmolLM2-135M, the error of `NF4(W - L) + L` with a rank-r L is divided by that "
        "of `NF4(W)`; the table shows means of the nuclear norm, and of the Frobenius norm in brackets. LoftQ starts "
        "from `L = 0`, PiSSA from W's principal part; each iteration quantizes `W - L` and fits L to what is missing "
        '(the first iteration of PiSSA keeps its L). `init_lora_weights="loftq"` does this on a dense base; '
        '`init_lora_weights="pissa"` leaves the base as it is and so starts with NF4\'s own error.'
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
