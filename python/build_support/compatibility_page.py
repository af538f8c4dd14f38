"""docs/compatibility.md: the outcomes of compatibility.py as tables."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from typing import Protocol

PACKAGES = ("torch", "numpy", "safetensors", "transformers")
CHECKS = ("wheel alone", "source", "op tests", "fine-tune")

HEAD = """# Compatibility

Written by `make compat` on {date}, on {machine}; do not edit. The supported ranges are those of `pyproject.toml`.

One wheel (CPython 3.10's stable ABI, torch 2.10's stable ABI) is built once and installed in every row. *oldest*: all
packages at their lower bounds; *oldest torch*, *oldest transformers*: that one and the newest of the rest. Columns:

- **wheel alone**: installed with its dependencies and no extra, imported; the codec and a LoRA linear's gradients run.
  numpy and safetensors are those of this step; the extras may need newer ones.
- **source**: the bindings compile against this torch's headers; the rest of `csrc` does not use torch.
- **op tests**: `tests/ops`, on the installed wheel.
- **fine-tune**: the command trains, saves and reloads an adapter of a tiny Llama on the CPU.
"""

TRITON = """
## Triton

Kernels compiled without a GPU by each version of Triton, for the configs that untuned dispatch picks in bf16, and how
many gates of `make kernels-report` they break.
"""


class Row(Protocol):
    """The fields of an outcome that the page shows."""

    name: str
    python: str
    versions: dict[str, str]
    checks: dict[str, str]


def page(outcomes: Sequence[Row], missing: Sequence[int], published: Mapping[str, str]) -> str:
    """Return the page. missing: minor versions of CPython without an interpreter; published: package -> newest
    release.
    """
    environments = [outcome for outcome in outcomes if not outcome.name.startswith("Triton")]
    tritons = [outcome for outcome in outcomes if outcome.name.startswith("Triton")]
    machine = f"{platform.system()} {platform.machine()}"
    lines = [HEAD.format(date=datetime.date.today().isoformat(), machine=machine)]
    lines += table(("row", "Python", *PACKAGES, *CHECKS), [cells(o, PACKAGES, CHECKS, o.python) for o in environments])
    lines += [TRITON]
    compiled = sorted({name for outcome in tritons for name in outcome.checks}, key=order)
    lines += table(("Triton", *compiled), [cells(o, ("triton",), compiled)[1:] for o in tritons])
    lines += ["", "## Not run", ""]
    lines += [f"- CPython 3.{minor}: no interpreter on this machine" for minor in missing]
    for package, newest in published.items():
        installed = {outcome.versions.get(package, "").partition("+")[0] for outcome in outcomes}
        if newest and newest not in installed:
            lines.append(f"- {package} {newest}: published, installed in no row")
    lines.append("- A GPU: the Triton kernels are compiled here, and run elsewhere by `make gpu-check`")
    return "\n".join(lines) + "\n"


def order(check: str) -> tuple[bool, int, str]:
    """Sort key: architectures by number, then the rest."""
    number = check.removeprefix("sm_")
    return (not number.isdigit(), int(number) if number.isdigit() else 0, check)


def cells(row: Row, packages: Sequence[str], checks: Sequence[str], *more: str) -> list[str]:
    """Return the cells of a row: its name, `more`, versions and checks."""
    versions = [row.versions.get(package, "") for package in packages]
    return [row.name, *more, *versions, *(row.checks.get(check, "") for check in checks)]


def table(heading: Sequence[str], content: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [
        "| " + " | ".join(heading) + " |",
        "|" + "---|" * len(heading),
        *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in content),
    ]
