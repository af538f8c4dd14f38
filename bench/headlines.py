"""The first tables of docs/benchmarks.md: ours beside each peer, machine by machine, and the cases that peers win."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .limits import is_limited
from .markdown import table
from .row_file import Row

BEGIN = "<!-- begin: headlines of python -m bench.report -->"
BEGIN_AHEAD = "<!-- begin: peers ahead, of python -m bench.report -->"

ONE_MACHINE = "All rows are of one machine: no table says how the contenders compare on a CPU of another kind."
"""Sentence below the table where the rows are of one machine."""


@dataclass(frozen=True)
class Headline:
    """One measurement of ours and the peers that it is compared with.

    words: name in the table.   op, case, mode, contender: fields of the row.   peers: keys of `field`.
    field: "speedup", the peer's time over ours, or "memory_ratio", our peak memory over the peer's.
    """

    words: str
    op: str
    case: str
    peers: tuple[str, ...]
    mode: str = "cold"
    contender: str = "ours"
    field: str = "speedup"

    def of(self, rows: Sequence[Row]) -> Row | None:
        """Return the row of this measurement, or None."""
        wanted = {"op": self.op, "case": self.case, "mode": self.mode, "contender": self.contender, "forced_isa": None}
        return next((row for row in rows if all(row.get(name) == value for name, value in wanted.items())), None)


SMALL, LARGE = "SmolLM2-135M M1024 r16 bf16", "llama-1b M1024 r16 bf16"
PEFT = ("bnb + PEFT", "dense + PEFT")
PLAIN = ("bnb eval", "dense")
LLAMA_CPP = "llama.cpp Q4_K"
PARTS = (", forward", ", loss alone")
"""Ends of the names of contenders that compute only a part of their op."""

HEADLINES: tuple[Headline, ...] = (
    Headline("training step, SmolLM2-135M, `fuse_model`", "train_step", SMALL, PEFT, contender="ours, fused"),
    Headline("training step, SmolLM2-135M", "train_step", SMALL, PEFT),
    Headline("training step, 1B Llama, `fuse_model`", "train_step", LARGE, PEFT, contender="ours, fused"),
    Headline(
        "peak memory of that step, 1B Llama", "train_step", LARGE, PEFT, contender="ours, fused", field="memory_ratio"
    ),
    Headline("linear layer with LoRA, 256 tokens, both passes", "linear_nf4_lora", "4096x4096 M256 r16 bf16", PEFT),
    Headline("linear layer, 1 token, forward", "linear_nf4", "4096x4096 M1 bf16", PLAIN),
    Headline("linear layer, 64 tokens, forward", "linear_nf4", "4096x4096 M64 bf16", PLAIN),
    Headline("linear layer, 1024 tokens, forward", "linear_nf4", "4096x4096 M1024 bf16", PLAIN),
    Headline("quantization of 4096 x 4096", "quantize_nf4", "4096x4096 bf16", ("bnb",)),
    Headline("dequantization of 4096 x 4096", "dequantize_nf4", "4096x4096 bf16", ("bnb",)),
    Headline("AdamW step, 1.1 million parameters", "adamw_step", "1.11M 120 tensors fp32", ("bnb", "torch")),
    Headline("prompt of 512 tokens, 1B Llama", "generate", "llama-1b M512 bf16", ("bnb", "dense", LLAMA_CPP)),
    Headline("one decoded token, 1B Llama", "generate", "llama-1b M1 bf16", ("bnb", "dense", LLAMA_CPP)),
)


def headlines(rows: Sequence[Row]) -> str:
    """Return the table with a line for each headline and peer, and what it says about CPUs of other kinds.

    rows: merged rows of any machines. Each machine has a column; where there are several, a last column names the
    machines on which ours is ahead. Lines without a measurement are omitted; "" without any. Rows that are limited to
    an instruction set are left out.
    """
    rows = [row for row in rows if not is_limited(row)]
    machines = {str(row["machine"]): str(row["isa"]) for row in rows if "machine" in row}
    of = {machine: [row for row in rows if row.get("machine") == machine] for machine in machines}
    lines = []
    for headline in HEADLINES:
        found = {machine: headline.of(of[machine]) for machine in machines}
        for peer in headline.peers:
            ratios = {machine: _ratio(headline, row, peer) for machine, row in found.items()}
            if any(ratio is not None for ratio in ratios.values()):
                cells = [_cell(headline, found[machine], ratios[machine]) for machine in machines]
                lines.append([headline.words, peer, *cells, *([_ahead(ratios)] if len(machines) > 1 else [])])
    if not lines:
        return ""
    columns = [f"{machine} ({isa})" for machine, isa in machines.items()]
    header = ["measured", "peer", *columns, *(["ours is ahead on"] if len(machines) > 1 else [])]
    return "\n\n".join(filter(None, [table(header, lines), ONE_MACHINE if len(machines) == 1 else ""]))


ALL_OF_OURS = ("ours", "ours, fused", "ours 8-bit")
"""Our contenders that do the same work as the peers of their suite, with all threads."""


def peers_ahead(rows: Sequence[Row]) -> str:
    """Return a table of the peers that are faster than ours in some case, the largest lead first; "" without any.

    rows: merged rows of any machines. Cases with a forced or limited instruction set are left out.
    """
    ratios: dict[tuple[str, str, str, str], list[tuple[float, str]]] = {}
    for row in rows:
        if row["contender"] in ALL_OF_OURS and row.get("forced_isa") is None and not is_limited(row):
            for peer, ratio in row.get("speedup", {}).items():
                if not peer.startswith("ours") and not peer.endswith(PARTS):
                    key = (str(row["machine"]), row["op"], row["contender"], peer)
                    ratios.setdefault(key, []).append((ratio, f"{row['case']} {row['mode']}"))
    several = len({key[0] for key in ratios}) > 1
    found = []
    for (machine, op, ours, peer), measured in ratios.items():
        worst, where = min(measured)
        ahead = sum(ratio < 1 for ratio, _ in measured)
        if ahead:
            line = [op, ours, peer, f"{ahead} of {len(measured)}", f"{worst:.2f}x", where]
            found.append((worst, [*line, *([machine] if several else [])]))
    header = ["op", "ours", "peer", "cases that the peer wins", "at worst", "where", *(["machine"] if several else [])]
    return table(header, [line for _, line in sorted(found)]) if found else ""


def _ratio(headline: Headline, row: Row | None, peer: str) -> float | None:
    """Return by how much the peer's time or memory exceeds ours, or None if it was not measured."""
    value = None if row is None else row.get(headline.field, {}).get(peer)
    return 1 / value if value and headline.field == "memory_ratio" else value


def _cell(headline: Headline, row: Row | None, ratio: float | None) -> str:
    if row is None or ratio is None:
        return "not measured"
    if headline.field == "memory_ratio":
        return f"{ratio:.2f}x ({row['peak_bytes'] / 1e9:.2f} GB)"
    seconds = row["median_us"] / 1e6
    return f"{ratio:.2f}x ({f'{1e3 * seconds:.3g} ms' if seconds < 1 else f'{seconds:.3g} s'})"


def _ahead(ratios: dict[str, float | None]) -> str:
    """Return on which of the measured machines the ratio is above 1."""
    measured = {machine: ratio for machine, ratio in ratios.items() if ratio is not None}
    ahead = [machine for machine, ratio in measured.items() if ratio > 1]
    if len(measured) == 1:
        return f"{ahead[0]}; no other was measured" if ahead else "none; one was measured"
    return "all" if len(ahead) == len(measured) else f"{', '.join(ahead)} only" if ahead else "none"
