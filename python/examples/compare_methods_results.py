"""The files of compare_methods: the rows of results, their table and their figure."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_by_rename(path: Path, text: str) -> None:
    """Write `text` to `path` by renaming a finished file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def load_rows(path: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the existing rows; raises SystemExit if they were made with other options."""
    if not path.exists():
        return []
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["options"] != options:
        raise SystemExit(f"compare_methods: {path} must have options {options}, got {found['options']}")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| method | trained weights | % of the model | accuracy % (± standard error) | CPU ms/step | peak GB |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['trained']:,} | {row['percent']:.3g} | {100 * row['accuracy']:.1f} "
            f"± {100 * row['error']:.1f} | {row['ms_per_step']:.0f} | {row['peak_gb']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the rows as a figure and save it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = sorted(rows, key=lambda row: -row["trained"])
    names = [row["method"] for row in rows]
    figure, axes = plt.subplots(1, 4, sharey=True, figsize=(11, 1 + 0.3 * len(rows)), layout="constrained")
    axes[0].scatter([row["percent"] for row in rows], names)
    axes[0].set(xscale="log", title="trained, % of the model")
    errors = [100 * row["error"] for row in rows]
    axes[1].errorbar([100 * row["accuracy"] for row in rows], names, xerr=errors, fmt="o", capsize=2)
    axes[1].set(title="accuracy, % ± standard error")
    axes[2].barh(names, [row["ms_per_step"] for row in rows])
    axes[2].set(title="CPU ms per step")
    axes[3].barh(names, [row["peak_gb"] for row in rows])
    axes[3].set(title="peak memory, GB")
    for ax in axes:
        ax.grid(axis="x", alpha=0.3)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
