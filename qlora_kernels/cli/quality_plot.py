"""The picture of `qlora-kernels quality`: codes beside those of normal weights, and the error of each layer."""

from __future__ import annotations

from pathlib import Path

from ..integrations.quantization_report import QuantizationReport


def draw(report: QuantizationReport, path: Path) -> None:
    """Write a PNG with the histogram of codes over their values, and the relative error of each layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    codes, errors = figure.subplots(1, 2)
    positions = list(range(len(report.normal)))
    codes.bar(positions, report.shares, color="tab:blue", width=0.8, label="all layers")
    codes.plot(positions, report.normal, color="tab:orange", marker="o", label="normal weights")
    codes.set_xlabel("NF4 code")
    codes.set_ylabel("share of the weights")
    codes.legend()
    errors.plot([layer.relative for layer in report.layers], color="tab:blue", marker=".", linewidth=0.8)
    errors.axhline(report.relative, color="tab:gray", linewidth=0.8)
    errors.set_xlabel("layer, in the order of the files")
    errors.set_ylabel("relative error")
    errors.set_ylim(bottom=0)
    figure.savefig(path, dpi=120, format="png")
