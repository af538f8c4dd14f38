"""Pictures of rows, as SVG files: speed over M, the roofline and memory for docs/benchmarks.md, AdaLoRA's ranks for
docs/fidelity.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from .fidelity import adalora
from .limits import is_limited
from .registry import COLD
from .row_file import Row

Plot = Any
"""matplotlib has no types."""

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qlora_kernels",  # ids of elements: the same in each run
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.facecolor": "white",
}

COLORS = {
    "ours": "#3949ab",
    "ours 8-bit": "#7986cb",
    "bnb eval": "#e65100",
    "bnb train": "#ffa726",
    "bnb": "#e65100",
    "bnb 8-bit": "#ffa726",
    "dense": "#546e7a",
    "torch": "#546e7a",
    "Unsloth-style": "#2e7d32",
    "torchao": "#ad1457",
    "torch int8": "#00838f",
    "oneDNN int8": "#26a69a",
    "torch int4": "#6d4c41",
    "linear_nf4": "#3949ab",
    "linear_nf4_grad_x": "#e65100",
    "linear_nf4_lora": "#2e7d32",
}
"""Color of each contender, and of each op in the roofline."""

MARKERS = {"linear_nf4": "o", "linear_nf4_grad_x": "s", "linear_nf4_lora": "^"}
"""Ops in the roofline, with their marks."""

WEIGHT_ONLY = ("torch int8", "oneDNN int8", "torch int4")
"""Contenders with other weights than NF4, drawn as dotted lines."""

OVER_TOKENS = ("ours", "bnb eval", "bnb train", "dense", "Unsloth-style", "torchao", *WEIGHT_ONLY)
"""Contenders whose speed is drawn over M if they have rows."""

SHAPES = ((4096, 4096), (14336, 4096), (11008, 4096), (576, 1536))
"""(N, K) of the layers whose speed is drawn over M: the first two that have rows, and the last."""


def draw(rows: Sequence[Row], fidelity: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures of the first machine's rows into a folder, and return their paths.

    rows: merged rows of bench.run. fidelity: rows of bench.fidelity; those of the claims `memory` and `adalora` are
    drawn.
    A picture for which there are no rows is left out.
    """
    machine = next((row["machine"] for row in rows if "machine" in row and not is_limited(row)), "")
    rows = [row for row in rows if row.get("machine", machine) == machine]
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, picture in PICTURES.items():
        with plt.rc_context(STYLE):
            figure = picture(rows, fidelity)
            if figure is None:
                continue
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
            plt.close(figure)
        made.append(path)
    return made


def speed_over_tokens(rows: Sequence[Row], fidelity: Sequence[Row]) -> Plot | None:
    """Draw GFLOP/s of a linear layer's forward over the number of tokens, for ours and each peer."""
    cold = [row for row in rows if row["op"] == "linear_nf4" and row.get("mode") == COLD and row["forced_isa"] is None]
    cold = [row for row in cold if row["dtype"] == "bfloat16" and "median_us" in row]
    shapes = [shape for shape in SHAPES if any((row["N"], row["K"]) == shape for row in cold)]
    if not shapes:
        return None
    shapes = [*shapes[:2], *shapes[2:][-1:]]
    figure, axes = plt.subplots(1, len(shapes), figsize=(3 * len(shapes), 3), squeeze=False, sharey=True)
    peak = _peak(rows, "bf16")
    for axis, (n, k) in zip(axes[0], shapes, strict=True):
        for contender in OVER_TOKENS:
            chosen = [row for row in cold if (row["N"], row["K"], row["contender"]) == (n, k, contender)]
            points = sorted((row["M"], 2 * row["M"] * n * k / row["median_us"] / 1e3) for row in chosen)
            if points:
                style = {"ls": ":" if contender in WEIGHT_ONLY else "-", "lw": 2 if contender == "ours" else 1.2}
                axis.plot(
                    *zip(*points, strict=True), marker="o", ms=3, label=contender, color=COLORS[contender], **style
                )
        if peak:
            axis.axhline(peak, color="black", lw=0.8, ls="--")
            axis.annotate("bf16 peak", (1, peak), xytext=(0, 3), textcoords="offset points", fontsize=8)
        axis.set_xscale("log", base=4)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(yscale="log", title=f"W {n} x {k}", xlabel="M, tokens")
    axes[0][0].set_ylabel("GFLOP/s, cold weights")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines() if line.get_label() in COLORS}
    figure.legend(
        lines.values(), lines.keys(), fontsize=9, ncols=min(len(lines), 4), loc="upper center", bbox_to_anchor=(0.5, 0)
    )
    figure.tight_layout()
    return figure


def roofline(rows: Sequence[Row], fidelity: Sequence[Row]) -> Plot | None:
    """Draw GFLOP/s of our kernels over flops per byte of the minimum traffic, with the measured peaks."""
    peak, bandwidth = _peak(rows, "bf16"), _peak(rows, "read")
    ours = [row for row in rows if row.get("contender") == "ours" and row.get("mode") == COLD and row["op"] in MARKERS]
    ours = [row for row in ours if row.get("dtype") == "bfloat16" and row.get("gflops") and row.get("gbps")]
    if not (peak and bandwidth and ours):
        return None
    figure, axis = plt.subplots(figsize=(6, 4))
    intensities = [row["gflops"] / row["gbps"] for row in ours]
    low, high = min(intensities) / 2, max(intensities) * 2
    ridge = peak / bandwidth
    axis.plot([low, ridge, high], [low * bandwidth, peak, peak], color="black", lw=1)
    axis.annotate(f"{peak:.0f} GFLOP/s", (high, peak), xytext=(-2, 3), textcoords="offset points", ha="right")
    middle = (low * ridge) ** 0.5
    axis.annotate(
        f"{bandwidth:.0f} GB/s", (middle, middle * bandwidth), xytext=(-8, 0), textcoords="offset points", ha="right"
    )
    for op, marker in MARKERS.items():
        points = [(row["gflops"] / row["gbps"], row["gflops"]) for row in ours if row["op"] == op]
        if points:
            axis.scatter(*zip(*points, strict=True), s=16, marker=marker, label=op, color=COLORS[op], alpha=0.7)
    axis.set(xscale="log", yscale="log", xlabel="flops per byte that must move", ylabel="GFLOP/s, cold weights")
    axis.legend(fontsize=8, loc="lower right")
    return figure


def memory(rows: Sequence[Row], fidelity: Sequence[Row]) -> Plot | None:
    """Draw bars of optimizer state per parameter, of a step's measured peak, and of QLoRA training by formula."""
    steps = [row for row in rows if "peak_bytes" in row]
    states = [row for row in rows if "state_bytes_per_element" in row]
    models = [row for row in fidelity if row["claim"] == "memory" and not row["quick"]]
    panels: list[Callable[[Plot], None]] = []
    if states:
        panels.append(lambda axis: _state_bars(axis, states))
    if steps:
        panels.append(lambda axis: _peak_bars(axis, steps))
    if models:
        panels.append(lambda axis: _model_bars(axis, models))
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        panel(axis)
        axis.grid(axis="x", visible=False)
    figure.tight_layout()
    return figure


def adalora_ranks(rows: Sequence[Row], fidelity: Sequence[Row]) -> Plot | None:
    """Draw AdaLoRA's final ranks as a map, one line per block and one column per kind of layer, mean of the seeds."""
    ranks = adalora.mean_ranks([row for row in fidelity if row["claim"] == "adalora" and not row["quick"]])
    if not ranks:
        return None
    kinds = list(dict.fromkeys(adalora.kind(layer) for layer in ranks))
    blocks = sorted({adalora.block(layer) for layer in ranks})
    cells = {(adalora.block(layer), adalora.kind(layer)): rank for layer, rank in ranks.items()}
    figure, axis = plt.subplots(figsize=(6.5, 3))
    values = [[cells[row, column] for column in kinds] for row in blocks]
    image = axis.imshow(values, cmap="Blues", vmin=0, vmax=12, aspect="auto")
    for y, row in enumerate(blocks):
        for x, column in enumerate(kinds):
            dark = cells[row, column] > 8
            axis.text(x, y, f"{cells[row, column]:.1f}", ha="center", va="center", color="white" if dark else "black")
    names = [name if name.startswith("attention") else f"MLP.{name}" for name in kinds]
    names = [name.removesuffix(".dense").removeprefix("attention.self.").replace(".", "\n") for name in names]
    axis.set_xticks(range(len(kinds)), names)
    axis.set_yticks(range(len(blocks)), [str(row) for row in blocks])
    axis.set_ylabel("block")
    axis.grid(visible=False)
    figure.colorbar(image, label="final rank, mean of seeds")
    return figure


def _state_bars(axis: Plot, rows: Sequence[Row]) -> None:
    chosen = [row for row in rows if row["case"] == rows[0]["case"]]
    names = [row["contender"] for row in chosen]
    values = [row["state_bytes_per_element"] for row in chosen]
    bars = axis.bar(names, values, color=[COLORS.get(name, "#546e7a") for name in names])
    axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set(title="AdamW state", ylabel="bytes per parameter")
    axis.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=8)


def _peak_bars(axis: Plot, rows: Sequence[Row]) -> None:
    """Draw the peak memory of each contender's process in a step of the largest model."""
    case = max(rows, key=lambda row: row["peak_bytes"])["case"]
    chosen = [row for row in rows if row["case"] == case]
    names = [row["contender"].replace(" + ", "\n+ ").replace(", ", ",\n") for row in chosen]
    colors = [COLORS["ours" if row["contender"].startswith("ours") else row["contender"].split()[0]] for row in chosen]
    bars = axis.bar(names, [row["peak_bytes"] / 1e9 for row in chosen], color=colors)
    axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set(title=f"Training step, {case.split()[0]}", ylabel="GB, measured peak")
    axis.tick_params(axis="x", labelsize=8)


def _model_bars(axis: Plot, rows: Sequence[Row]) -> None:
    parts = {
        "base_bytes": ("base, NF4 + DQ", "#3949ab"),
        "adapter_bytes": ("adapters, r = 64", "#7986cb"),
        "gradient_bytes": ("gradients", "#ffa726"),
        "optimizer_bytes": ("AdamW states", "#e65100"),
    }
    names, floor = [row["model"] for row in rows], [0.0] * len(rows)
    for part, (label, color) in parts.items():
        heights = [row[part] / 1e9 for row in rows]
        axis.bar(names, heights, bottom=floor, label=label, color=color)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    axis.plot(names, [row["paper_gb"] for row in rows], "k_", ms=18, label="4-bit model in the paper")
    axis.set(title="LLaMA under QLoRA, by formula", ylabel="GB")
    axis.legend(fontsize=7)


def _peak(rows: Sequence[Row], name: str) -> float | None:
    found = [row["rate"] for row in rows if row["op"] == "peak" and row["case"] == name and row["forced_isa"] is None]
    return float(found[0]) if found else None


PICTURES: dict[str, Callable[[Sequence[Row], Sequence[Row]], Plot | None]] = {
    "speed-over-tokens": speed_over_tokens,
    "roofline": roofline,
    "memory": memory,
    "adalora-ranks": adalora_ranks,
}
"""Name of a file -> the function that draws it."""
