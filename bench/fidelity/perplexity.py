"""Claim `perplexity`: of the 4-bit types NF4 costs a language model the least, and double quantization is free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..markdown import table
from ..row_file import Row
from . import subject
from .claim import Claim, Finding, find
from .codes import CODES, DOUBLE_QUANTIZED, ONLY_BLOCKSIZE, rounded

BASE: Row = {"type": "bf16", "blocksize": None}

PAPER = {"int4": 34.34, "FP4 E2M1": 31.07, DOUBLE_QUANTIZED: 27.41}
"""QLoRA's table 2: mean over OPT, BLOOM, LLaMA and Pythia of 125M to 13B parameters, on Common Crawl from The Pile."""


def cases(quick: bool) -> list[Row]:
    """Return the base, every type in blocks of 64, and the paper's types in other blocks."""
    of_64: list[Row] = [{"type": kind, "blocksize": 64} for kind in ("NF4", DOUBLE_QUANTIZED, *list(CODES)[1:])]
    others: list[Row] = [
        {"type": kind, "blocksize": blocksize}
        for blocksize in (() if quick else (32, 128, 256))
        for kind in ("NF4", DOUBLE_QUANTIZED, "FP4 E2M1", "FP4 bitsandbytes", "int4")
        if kind not in ONLY_BLOCKSIZE
    ]
    return [BASE, *of_64, *others]


@torch.no_grad()
def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Measure the dense model with each weight rounded to its 4-bit form."""
    if not chosen:
        return
    model = subject.model(quick)
    layers = subject.linears(model)
    dense = {name: layer.weight.clone() for name, layer in layers.items()}
    for case in chosen:
        for name, layer in layers.items():
            weight = dense[name]
            layer.weight.copy_(weight if case["type"] == "bf16" else rounded(weight, case["type"], case["blocksize"]))
        yield case | {"perplexity": round(subject.perplexity_of(model, quick), 4)}


def show(rows: Sequence[Row]) -> str:
    """Return a table with one line per type and one column per blocksize."""
    blocksizes = sorted({row["blocksize"] for row in rows if row["blocksize"]})
    types = [kind for kind in dict.fromkeys(row["type"] for row in rows) if kind != "bf16"]
    base = find(rows, **BASE)
    lines = []
    for kind in types:
        found = [find(rows, type=kind, blocksize=blocksize) for blocksize in blocksizes]
        paper = f"{PAPER[kind]:.2f}" if kind in PAPER else ""
        lines.append([kind, *(f"{row['perplexity']:.3f}" if row else "" for row in found), paper])
    shown = table(["type", *(f"blocks of {blocksize}" for blocksize in blocksizes), "paper, other models"], lines)
    head = f"Without quantization (bf16): {base['perplexity']:.3f}." if base else ""
    nf4 = find(rows, type="NF4", blocksize=64)
    if base and nf4:
        head += f" NF4 costs this small model {nf4['perplexity'] / base['perplexity'] - 1:.1%} before any training."
    return "\n\n".join(filter(None, [head, shown]))


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Compare the order of the types in blocks of 64 with that of the paper's table."""
    of = {row["type"]: row["perplexity"] for row in rows if row["blocksize"] in (64, None)}
    findings = []
    if {DOUBLE_QUANTIZED, "FP4 E2M1", "int4"} <= of.keys():
        words = ", ".join(f"{kind} {of[kind]:.3f}" for kind in (DOUBLE_QUANTIZED, "FP4 E2M1", "int4"))
        findings += [
            Finding(
                "QLoRA",
                "NF4 with double quantization has a lower perplexity than FP4 and int4, in blocks of 64",
                of[DOUBLE_QUANTIZED] < min(of["FP4 E2M1"], of["int4"]),
                words,
            ),
            Finding(
                "QLoRA", "FP4 has a lower perplexity than int4, in blocks of 64", of["FP4 E2M1"] < of["int4"], words
            ),
        ]
    other = {
        blocksize: {kind: row["perplexity"] for kind in PAPER if (row := find(rows, type=kind, blocksize=blocksize))}
        for blocksize in (32, 128, 256)
    }
    if all(found.keys() == PAPER.keys() for found in other.values()):
        broken = [size for size, found in other.items() if min(found.values()) != found[DOUBLE_QUANTIZED]]
        words = ", ".join(f"{other[size][DOUBLE_QUANTIZED]:.3f} and {other[size]['FP4 E2M1']:.3f}" for size in other)
        findings.append(
            Finding(
                "QLoRA",
                "NF4 with double quantization has the lowest perplexity also in blocks of 32, 128 and 256",
                not broken,
                f"NF4 + DQ and FP4 have {words}"
                + (f"; the order is another in blocks of {', '.join(map(str, broken))}" if broken else ""),
            )
        )
    if {DOUBLE_QUANTIZED, "NF4"} <= of.keys():
        change = of[DOUBLE_QUANTIZED] / of["NF4"] - 1
        findings.append(
            Finding(
                "QLoRA",
                "Double quantization does not degrade the model, in blocks of 64 and within 0.5 %",
                change < 0.005,
                f"perplexity {of[DOUBLE_QUANTIZED]:.3f} with it, {of['NF4']:.3f} without: {change:+.2%}",
            )
        )
    if set(CODES) <= of.keys():
        lowest = min(CODES, key=lambda kind: of[kind])
        findings.append(
            Finding(
                "QLoRA",
                "Of the 4-bit types, NF4 has the lowest perplexity, in blocks of 64",
                lowest == "NF4",
                f"{lowest} has the lowest, {of[lowest]:.3f}, and NF4, whose error is the smallest, has {of['NF4']:.3f}",
            )
        )
    return findings


CLAIM = Claim(
    name="perplexity",
    title="Perplexity of a model in 4 bits",
    source="QLoRA (arXiv:2305.14314), section 4 and table 2",
    method=(
        "SmolLM2-135M in bf16 with the weights of all linear layers but the head rounded to each type, on the unseen "
        "text of the demo (16 windows of 256 tokens of Python's language reference, 4,080 predictions). The paper's "
        "column is the mean of other and larger models on other text: compare the order, not the numbers. The 16-bit "
        "model is itself dequantized from Q4_1. The verdicts are about one model and one text; the rows give no "
        "spread, so that a difference of one or two percent may be another on other text."
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
