"""Claim `error`: the errors of NF4, AF4, FP4 and int4 relative to the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..markdown import table
from ..row_file import Row
from . import subject
from .claim import Claim, Finding, find
from .codes import CODES, ONLY_BLOCKSIZE, indices, rounded

NORMAL = "normal"
MODEL = "SmolLM2-135M"


def cases(quick: bool) -> list[Row]:
    """Return every type at every blocksize for which it is defined."""
    return [
        {"weights": weights, "type": kind, "blocksize": blocksize}
        for weights in (NORMAL, MODEL)
        for blocksize in ((64,) if quick else (32, 64, 128, 256))
        for kind in CODES
        if ONLY_BLOCKSIZE.get(kind, blocksize) == blocksize
    ]


def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Yield errors relative to the weights, and the entropy of the indices."""
    loaded: dict[str, list[Tensor]] = {}
    for case in chosen:
        if case["weights"] not in loaded:
            loaded[case["weights"]] = _weights(case["weights"], quick)
        squares = squared_error = absolute = absolute_error = 0.0
        counts = torch.zeros(16, dtype=torch.float64)
        for weight in loaded[case["weights"]]:
            difference = rounded(weight, case["type"], case["blocksize"]) - weight
            squares += weight.square().sum(dtype=torch.float64).item()
            squared_error += difference.square().sum(dtype=torch.float64).item()
            absolute += weight.abs().sum(dtype=torch.float64).item()
            absolute_error += difference.abs().sum(dtype=torch.float64).item()
            counts += torch.bincount(indices(weight, case["type"], case["blocksize"]), minlength=16)
        share = counts[counts > 0] / counts.sum()
        yield case | {
            "rms": round(math.sqrt(squared_error / squares), 6),
            "mean_absolute": round(absolute_error / absolute, 6),
            "entropy": round(-(share * share.log2()).sum().item(), 4),
        }


def _weights(name: str, quick: bool) -> list[Tensor]:
    """Return the weights in fp32."""
    if name == NORMAL:
        return [torch.randn((1 << 12) if quick else (1 << 22), generator=torch.Generator().manual_seed(0))]
    return [linear.weight.float() for linear in subject.linears(subject.model(quick)).values()]


def show(rows: Sequence[Row]) -> str:
    """Return a table with one line per type and blocksize."""
    return table(
        [
            "weights",
            "blocksize",
            "type",
            "RMS error / RMS weight",
            "mean abs. error / mean abs. weight",
            "entropy, bits",
        ],
        [
            [
                row["weights"],
                str(row["blocksize"]),
                row["type"],
                f"{row['rms']:.4f}",
                f"{row['mean_absolute']:.4f}",
                f"{row['entropy']:.3f}",
            ]
            for row in rows
        ],
    )


def _other_blocks(rows: Sequence[Row], kind: str, others: Sequence[str]) -> str:
    """Return in words in which blocks other than 64 the type has the smallest error of these types."""
    smallest: dict[bool, list[str]] = {True: [], False: []}
    for size in sorted({row["blocksize"] for row in rows} - {64}):
        of = {row["type"]: row["rms"] for row in rows if row["blocksize"] == size}
        if {kind, *others} <= of.keys():
            smallest[all(of[kind] < of[other] for other in others)].append(str(size))
    words = [
        f"{verb} in blocks of {', '.join(smallest[holds])}"
        for holds, verb in ((True, "so"), (False, "not so"))
        if smallest[holds]
    ]
    return "".join(f"; {part}" for part in words)


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Judge blocks of 64 on both kinds of weights."""
    findings = []
    for weights in (NORMAL, MODEL):
        of = {kind: row for kind in CODES if (row := find(rows, weights=weights, type=kind, blocksize=64))}
        if len(of) < len(CODES):
            continue
        where = "normal weights" if weights == NORMAL else f"the weights of {MODEL}"
        rms = {kind: row["rms"] for kind, row in of.items()}
        others = ("FP4 E2M1", "FP4 bitsandbytes", "int4")
        of_weights = [row for row in rows if row["weights"] == weights]
        findings += [
            Finding(
                "QLoRA",
                f"NF4 has a smaller error than FP4 and int4 on {where}, in blocks of 64",
                all(rms["NF4"] < rms[other] for other in others),
                "RMS error: "
                + ", ".join(f"{kind} {rms[kind]:.4f}" for kind in ("NF4", *others))
                + _other_blocks(of_weights, "NF4", others),
            ),
            Finding(
                "QLoRA",
                f"FP4 has a smaller error than int4 on {where}, in blocks of 64",
                rms["FP4 E2M1"] < rms["int4"],
                f"RMS error: FP4 E2M1 {rms['FP4 E2M1']:.4f}, int4 {rms['int4']:.4f}"
                + _other_blocks(of_weights, "FP4 E2M1", ("int4",)),
            ),
            Finding(
                "AF4",
                f"AF4 has a smaller mean absolute error than NF4 on {where}, in blocks of 64",
                of["AF4"]["mean_absolute"] < of["NF4"]["mean_absolute"],
                f"AF4 {of['AF4']['mean_absolute']:.4f}, NF4 {of['NF4']['mean_absolute']:.4f}; "
                f"RMS error: AF4 {rms['AF4']:.4f}, NF4 {rms['NF4']:.4f}",
            ),
        ]
    normal = find(rows, weights=NORMAL, type="NF4", blocksize=64)
    if normal is not None:
        findings.append(
            Finding(
                "QLoRA",
                "NF4 is information-theoretically optimal for normal weights: all 16 values are used equally often",
                normal["entropy"] > 3.999,
                f"the indices have an entropy of {normal['entropy']:.3f} bits, not 4, with blocks of 64",
            )
        )
    return findings


CLAIM = Claim(
    name="error",
    title="Error of 4-bit data types",
    source=(
        "QLoRA (arXiv:2305.14314), section 3, 4-bit NormalFloat, and table 2; "
        "NF4 Isn't Information Theoretically Optimal (arXiv:2306.06965)"
    ),
    method=(
        "4,194,304 normal numbers, and the 106 million weights of SmolLM2-135M's 210 linear layers, are rounded to "
        "each type and compared in fp32. int4 is symmetric, with 15 values. FP4 E2M1 is the standard's; bitsandbytes' "
        "FP4 has another smallest value. AF4 is bitsandbytes' table, for blocks of 64 only. SmolLM2's weights come "
        "from a Q4_1 file, so that they are not the original bf16 weights."
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
