"""Claim `memory`: a 65B model needs 780 GB for fine-tuning in 16 bits, and less than 48 GB under QLoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..markdown import table
from ..row_file import Row
from .bits import formula
from .claim import Claim, Finding, find

VOCABULARY = 32000
RANK = 64
"""QLoRA's rank, on every linear layer of the blocks (appendix B)."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA model (arXiv:2302.13971, table 2), whose head is not tied to its embedding.

    paper_gb: the memory that QLoRA's table 6 states for the model in 4 bits.
    """

    hidden: int
    ffn: int
    blocks: int
    paper_gb: int

    @property
    def linear(self) -> int:
        """Return the number of quantized weights: four projections of attention and three of the MLP in each block."""
        return self.blocks * (4 * self.hidden**2 + 3 * self.hidden * self.ffn)

    @property
    def dense(self) -> int:
        """Return the number of weights in 16 bits: embedding, head and norms."""
        return 2 * VOCABULARY * self.hidden + (2 * self.blocks + 1) * self.hidden

    @property
    def lora(self) -> int:
        """Return the number of parameters in the adapters of all blocks."""
        return self.blocks * RANK * (4 * 2 * self.hidden + 3 * (self.hidden + self.ffn))


SHAPES = {
    "7B": Shape(4096, 11008, 32, 5),
    "13B": Shape(5120, 13824, 40, 10),
    "33B": Shape(6656, 17920, 60, 21),
    "65B": Shape(8192, 22016, 80, 41),
}


def cases(quick: bool) -> list[Row]:
    """Return the four sizes of LLaMA, with the paper's names."""
    return [{"model": name} for name in SHAPES]


def measure(chosen: Sequence[Row], quick: bool) -> Iterator[Row]:
    """Yield bytes by formula; nothing is allocated."""
    for case in chosen:
        shape = SHAPES[case["model"]]
        base = shape.linear * formula(64, True) / 8
        yield case | {
            "parameters": shape.linear + shape.dense,
            "base_bytes": round(base + 2 * shape.dense),
            "adapter_bytes": 2 * shape.lora,
            "gradient_bytes": 2 * shape.lora,
            "optimizer_bytes": 8 * shape.lora,
            "full_bytes": (2 + 2 + 8) * (shape.linear + shape.dense),
            "double_quant_saves_bytes": round(shape.linear * (formula(64, False) - formula(64, True)) / 8),
            "paper_gb": shape.paper_gb,
        }


def _trained(row: Row) -> float:
    """Return all bytes of QLoRA training except the activations."""
    return float(row["base_bytes"] + row["adapter_bytes"] + row["gradient_bytes"] + row["optimizer_bytes"])


def show(rows: Sequence[Row]) -> str:
    """Return a table with one line per size, in decimal gigabytes."""
    return table(
        [
            "LLaMA",
            "base in NF4 + DQ, GB",
            "base and adapters, GB",
            "paper, table 6, GB",
            "with gradients and AdamW states, GB",
            "full fine-tuning in 16 bits, GB",
            "double quantization saves, GB",
        ],
        [
            [
                row["model"],
                f"{row['base_bytes'] / 1e9:.1f}",
                f"{(row['base_bytes'] + row['adapter_bytes']) / 1e9:.1f}",
                str(row["paper_gb"]),
                f"{_trained(row) / 1e9:.1f}",
                f"{row['full_bytes'] / 1e9:.0f}",
                f"{row['double_quant_saves_bytes'] / 1e9:.2f}",
            ]
            for row in rows
        ],
    )


def judge(rows: Sequence[Row]) -> list[Finding]:
    """Compare the largest model with the abstract."""
    row = find(rows, model="65B")
    if row is None:
        return []
    full, trained, saved = row["full_bytes"] / 1e9, _trained(row) / 1e9, row["double_quant_saves_bytes"] / 1e9
    stated = {name: found for name in SHAPES if (found := find(rows, model=name))}
    gaps = [found["paper_gb"] - (found["base_bytes"] + found["adapter_bytes"]) / 1e9 for found in stated.values()]
    return [
        Finding(
            "QLoRA",
            "Fine-tuning a 65B model in 16 bits takes more than 780 GB",
            full > 780,
            f"{full:.0f} GB for 16-bit weights and gradients and 32-bit AdamW states",
        ),
        Finding(
            "QLoRA",
            "QLoRA fine-tunes a 65B model in less than 48 GB",
            trained < 48,
            f"{trained:.1f} GB before activations, which the formula leaves out",
        ),
        Finding("QLoRA", "Double quantization saves about 3 GB of a 65B model", round(saved) == 3, f"{saved:.2f} GB"),
        Finding(
            "QLoRA",
            "The 4-bit models take 5, 10, 21 and 41 GB",
            all(abs(gap) < 1 for gap in gaps),
            f"base and adapters are {min(gaps):.1f} to {max(gaps):.1f} GB smaller by the formula; the paper does not "
            "say what its figures include",
        ),
    ]


CLAIM = Claim(
    name="memory",
    title="Memory of LLaMA 7B to 65B",
    source="QLoRA (arXiv:2305.14314), abstract, section 3 and table 6; sizes: LLaMA (arXiv:2302.13971), table 2",
    method=(
        "By formula, without running a model: 4.127 bits for each weight of the blocks' linear layers, 16 bits for "
        "embedding, head and norms, adapters of rank 64 on every linear layer with 16-bit parameters and gradients and "
        "32-bit AdamW states. Activations are left out. GB are 10^9 bytes."
    ),
    cases=cases,
    measure=measure,
    table=show,
    judge=judge,
)
