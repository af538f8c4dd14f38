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

One wheel is built and installed into a new environment for each row. It uses the stable ABIs of CPython 3.10 and of
torch 2.10, so that it works with all later versions. The rows:

- *oldest*: every package at its lower bound.
- *oldest torch*: torch at its lower bound, and the newest versions of the others that this Python permits.
- *newest*: the newest version of every package.
- *oldest transformers*: transformers at its lower bound, and the newest versions of the others.

The columns after the versions:

- **wheel alone**: the wheel is installed with its dependencies and without extras, and imported; quantization and the
  gradients of a LoRA linear run. The versions of numpy and safetensors are those of this step; the extras may need
  newer ones.
- **source**: the bindings compile against this torch's headers. The rest of `csrc` does not use torch.
- **op tests**: `tests/ops`, with the installed wheel. Tests that need the CUDA library or another CPU are skipped.
- **fine-tune**: `qlora-kernels finetune` trains, saves and reloads an adapter of a tiny Llama on the CPU, and tiny
  models that were quantized in place are saved and loaded.
"""

TRITON = """
## Triton

The number of kernels that each version of Triton compiled for each architecture, without a GPU, for the configs that
dispatch chooses in bf16 without tuning, and the number of gates of `make kernels-report` that they break.
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
