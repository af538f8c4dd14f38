"""Measure claims of papers: `python -m bench.fidelity [CLAIM ...] [--out FILE]`; `... report` writes the page.

A case whose row is in --out already is not measured again, so that an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..machine import ROOT, provenance
from ..markdown import replace_marked
from ..row_file import Row, RowWriter, read_rows
from .claim import has_case
from .claims import CLAIMS
from .report import BEGIN, END, report

RESULTS = ROOT / "bench" / "results" / "fidelity.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure claims or write their report.

    Raises SystemExit for an unknown claim.
    """
    options = _parser().parse_args(arguments)
    if options.claims[:1] == ["report"]:
        return _report(options)
    unknown = [name for name in options.claims if name not in CLAIMS]
    if unknown:
        raise SystemExit(f"bench.fidelity: CLAIM must be one of {', '.join(CLAIMS)}, or report, got {unknown[0]}")
    known = list(read_rows(options.out)) if options.out and options.out.exists() and not options.again else []
    file = options.out.open("a", buffering=1) if options.out else None  # each row is kept as soon as it is measured
    writer = RowWriter(file) if file else None
    for row in run(options.claims or list(CLAIMS), known, quick=options.quick):
        print(
            json.dumps({name: value for name, value in row.items() if name not in ("versions", "machine")}), flush=True
        )
        if writer:
            writer.write(row)
    if file:
        file.close()
    return 0


def run(names: Sequence[str], known: Sequence[Row], *, quick: bool) -> Iterator[Row]:
    """Yield the rows of all cases of these claims that `known` lacks."""
    common = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **provenance("cpu")}
    for name in names:
        claim = CLAIMS[name]
        identity = {"claim": name, "quick": quick}
        missing = [case for case in claim.cases(quick) if not any(has_case(row, identity | case) for row in known)]
        for row in claim.measure(missing, quick):
            yield identity | row | common


def _report(options: argparse.Namespace) -> int:
    source = options.out or RESULTS
    text = report(list(read_rows(source)), source.name if options.out else RESULTS.relative_to(ROOT).as_posix())
    if options.update:
        replace_marked(options.update, BEGIN, END, text)
    else:
        print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"{', '.join(CLAIMS)}; none: all; or: report")
    parser.add_argument(
        "--quick", action="store_true", help="tiny cases on a random model, to see that all of it works"
    )
    parser.add_argument("--again", action="store_true", help="measure also the cases whose rows are in --out")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="append the rows to this file; report: read them from it"
    )
    parser.add_argument("--update", type=Path, metavar="PAGE", help="with report: rewrite the marked part of this page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
