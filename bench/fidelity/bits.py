"""Claim `bits`: NF4 takes 4.127 bits per parameter with double quantization and 4.5 without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

import qlora_kernels as qk
from qlora_kernels.format.double_quant import NESTED_BLOCKSIZE

from ..markdown import table
from ..row_file import Row
from . import subject
from .claim import Claim, Finding, find

SQUARE = "one weight 4096x4096"
MODEL = "all linear layers of SmolLM2-135M"


def formula(blocksize: int, double_quant: bool) -> float:
    """Return the bits per parameter of a tensor with full blocks."""
    constants = 8 / blocksize + 32 / (blocksize * NESTED_BLOCKSIZE) if double_quant else 32 / blocksize
    return 4 + constants


def cases(quick: bool) -> list[Row]:
    """Return the square weight at every compared blocksize, and the model at the default one."""
    blocksizes = (64,) if quick else (32, 64, 128, 256)
    squares: list[Row] = [
        {"weights": SQUARE, "blocksize": size, "double_quant": dq} for size in blocksizes for dq in (False, True)
    ]
    models: list[Row] = [{"weights": MODEL, "blocksize": 64, "double_quant": dq} for dq in (False, True)]
    return squares + models


def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Count the bytes of the tensors that quantization returns."""
    for case in chosen:
        if case["weights"] == SQUARE:
            weights = [torch.randn((128, 128) if quick else (4096, 4096), generator=torch.Generator().manual_seed(0))]
        else:
            weights = [linear.weight for linear in subject.linears(subject.model(quick)).values()]
        total, parameters = 0, 0
        for weight in weights:
            packed, state = qk.quantize_nf4(weight, blocksize=case["blocksize"], double_quant=case["double_quant"])
            constants = [tensor for tensor in state.constants if tensor is not None]
            total += packed.nbytes + sum(tensor.nbytes for tensor in constants)
            parameters += weight.numel()
        yield case | {"parameters": parameters, "bytes": total, "bits": round(8 * total / parameters, 5)}


def show(rows: Sequence[Row]) -> str:
    """Return a table of counted bits and the formula."""
    return table(
        ["weights", "blocksize", "double quantization", "parameters", "bytes", "bits per parameter", "formula"],
        [
            [
                row["weights"],
                str(row["blocksize"]),
                "yes" if row["double_quant"] else "no",
                f"{row['parameters']:,}",
                f"{row['bytes']:,}",
                f"{row['bits']:.4f}",
                f"{formula(row['blocksize'], row['double_quant']):.4f}",
            ]
            for row in rows
        ],
    )


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Compare the square weight in blocks of 64 with the paper's figures."""
    with_dq = find(rows, weights=SQUARE, blocksize=64, double_quant=True)
    without = find(rows, weights=SQUARE, blocksize=64, double_quant=False)
    if with_dq is None or without is None:
        return []
    saved = without["bits"] - with_dq["bits"]
    return [
        Finding(
            "QLoRA",
            "Double quantization reduces the constants of blocks of 64 from 0.5 to 0.127 bits per parameter",
            round(with_dq["bits"], 3) == 4.127 and round(without["bits"], 3) == 4.5,
            f"4 + {with_dq['bits'] - 4:.4f} bits with it, 4 + {without['bits'] - 4:.4f} without; "
            f"{saved:.3f} bits saved",
        )
    ]


CLAIM = Claim(
    name="bits",
    title="4.127 bits per parameter",
    source="QLoRA (arXiv:2305.14314), section 3, Double Quantization",
    method=(
        "The bytes of the tensors that `quantize_nf4` returns are counted. The last group of a small tensor has fewer "
        "than 256 constants, so that a model of small layers takes a little more than the formula."
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
