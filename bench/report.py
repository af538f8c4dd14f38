"""Tables of benchmark rows: `python -m bench.report [FILE...]` merges runs and prints the report of `make bench`.

The format is Markdown, so that docs/benchmarks.md contains the same text (`--update docs/benchmarks.md`). Without a
FILE, the committed rows are used. `--pictures docs/assets` draws the pictures of that page (bench/pictures.py).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from . import headlines, without_avx512
from .machine import ROOT
from .markdown import replace_marked, table
from .row_file import Row, read_rows, write_rows
from .targets import Verdict, judge

BEGIN, END = "<!-- begin: python -m bench.report -->", "<!-- end -->"

FIDELITY = ROOT / "bench" / "results" / "fidelity.jsonl"
"""The rows of bench.fidelity, which are no benchmark rows."""

CAUSES = "docs/notebook/missed-targets.md"
"""The page with one heading for each missed target and the measured cause below it."""

UNITS = {"read": "GB/s", "copy": "GB/s", "bf16": "GFLOP/s", "fma": "GFLOP/s"}

PARTS = ("forward", "loss alone")
"""Ends of the names of contenders that compute only a part of their op."""

WHOLE_MODELS = ("train_step", "evaluate", "generate")
"""Ops for which each of our implementations, such as a fused model, has a separate line in the table."""

MERGED = (
    "median_us",
    "p10_us",
    "p90_us",
    "gbps",
    "gflops",
    "roofline",
    "foreign",
    "rate",
    "speedup",
    "fraction",
    "peak_bytes",
    "memory_ratio",
)
"""Fields that are merged to the median of several runs."""

IDENTITY = ("machine", "isa", "op", "case", "forced_isa", "contender", "threads", "mode", "gate")
"""Fields that are equal for the rows of one measurement in several runs."""

DISTURBED = 0.1
"""Share of the processors used by others above which a row is left out if a run with less has the same row."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write the report of the rows in some files."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON lines of bench.run; default: the committed rows")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="replace the marked part of this page")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="write the merged rows to this file")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw the rows into this folder, too")
    options = parser.parse_args(arguments)
    rows = merge(row for file in options.files or committed_files() for row in read_rows(file))
    if options.merge:
        write_rows(options.merge, rows)
    text = report(rows)
    if options.update:
        replace_marked(options.update, headlines.BEGIN, END, headlines.headlines(rows))
        replace_marked(options.update, headlines.BEGIN_AHEAD, END, headlines.peers_ahead(rows))
        replace_marked(options.update, without_avx512.BEGIN, END, without_avx512.without_avx512(rows))
        replace_marked(options.update, BEGIN, END, "\n\n".join(filter(None, [without_rows(rows), text])))
    else:
        print("\n\n".join(filter(None, [headlines.headlines(rows), text])))
    if options.pictures:
        from .pictures import draw  # matplotlib, which nothing else needs

        draw(rows, list(read_rows(FIDELITY)) if FIDELITY.exists() else [], options.pictures)
    return 0


def without_rows(rows: Iterable[Row]) -> str:
    """Return a sentence with the contenders of each suite that have no row, or "" if all have rows."""
    from .suites import suites  # which import torch and all layers

    measured = {(row["op"], row["contender"]) for row in rows}
    missing = {
        op: [contender.name for contender in suite.contenders if (op, contender.name) not in measured]
        for op, suite in suites().items()
    }
    listed = [
        f"{op} ({'all contenders' if len(names) == len(suites()[op].contenders) else ', '.join(names)})"
        for op, names in missing.items()
        if names
    ]
    return f"Not measured on these machines yet: {'; '.join(listed)}." if listed else ""


def committed_files() -> list[Path]:
    """Return the files of benchmark rows in the repository, each with the rows of one machine."""
    return [path for path in sorted(FIDELITY.parent.glob("*.jsonl")) if path != FIDELITY]


def print_report(rows: Iterable[Row], *, targets: bool) -> None:
    """Print the tables and targets of a run."""
    print(report(merge(rows), targets=targets))


def merge(rows: Iterable[Row]) -> list[Row]:
    """Return one row for each measurement that several runs on one machine repeated: the medians, and `runs`."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in IDENTITY)
        groups.setdefault(key, []).append(row)
    return [_median_row(group) for group in groups.values()]


def _median_row(group: Sequence[Row]) -> Row:
    group = [row for row in group if row.get("foreign", 0) <= DISTURBED] or group
    merged = dict(group[-1])
    for name in MERGED:
        values = [row[name] for row in group if name in row]
        if not values:
            continue
        if isinstance(values[0], dict):
            keys = dict.fromkeys(key for value in values for key in value)
            merged[name] = {k: round(statistics.median(v[k] for v in values if k in v), 3) for k in keys}
        else:
            merged[name] = round(statistics.median(values), 3)
    merged["runs"] = sum(row.get("runs", 1) for row in group)
    return merged


def report(rows: Sequence[Row], *, targets: bool = True) -> str:
    """Return the tables of all rows in Markdown, one machine after the other; `headlines` has them side by side."""
    machines = list(dict.fromkeys(row["machine"] for row in rows if "machine" in row))
    if len(machines) > 1:
        return "\n\n".join(report([row for row in rows if row["machine"] == of], targets=targets) for of in machines)
    parts = [_provenance(rows), _targets(judge(rows)) if targets else "", *_tables(rows), *_faults(rows)]
    return "\n\n".join(part for part in parts if part)


def _provenance(rows: Sequence[Row]) -> str:
    first = next((row for row in rows if "machine" in row), None)
    if first is None:
        return "No rows."
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows if "commit" in row))
    found = dict.fromkeys(item for row in rows for item in row.get("versions", {}).items())
    versions = ", ".join(f"{name} {version}" for name, version in found)
    runs = max(row.get("runs", 1) for row in rows)
    days = sorted({row["time"][:10] for row in rows if "time" in row})
    when = f"; measured {' to '.join(dict.fromkeys((days[0], days[-1])))}" if days else ""
    lines = [
        f"Machine: {first['machine']}; instruction set: {first['isa']}; commit: {commits}{when}; runs merged: {runs}.",
        f"Versions: {versions}.",
    ]
    peaks = [row for row in rows if row["op"] == "peak"]
    for isa in dict.fromkeys(row["forced_isa"] for row in peaks):
        rates = [
            f"{row['case']} {row['rate']:g} {UNITS[row['case']]} ({row['contender']})"
            for row in peaks
            if row["forced_isa"] == isa
        ]
        lines.append(f"Peaks{f' under {isa}' if isa else ''}: {', '.join(rates)}.")
    return "  \n".join(lines)


def _targets(verdicts: Sequence[Verdict]) -> str:
    lines = []
    for verdict in verdicts:
        if not verdict.measured:
            continue
        target, (row, worst) = verdict.target, verdict.measured[0]
        bound = f">= {target.at_least:g}" if target.at_least is not None else f"<= {target.at_most:g}"
        lines.append(
            (
                target.name + (" (stretch)" if target.stretch else ""),
                target.machine.words,
                target.formula.words,
                bound,
                verdict.status,
                f"{verdict.kept} of {len(verdict.measured)}",
                f"{verdict.reachable}",
                f"{worst:.2f}",
                " ".join(filter(None, (row["case"], row["mode"]))),
            )
        )
    if not lines:
        return ""
    shown = table(
        ("target", "machine", "formula", "bound", "verdict", "cases kept", "reachable", "worst", "where"), lines
    )
    missed = any(verdict.status == "missed" for verdict in verdicts)
    explained = [f"Why targets are missed: [{CAUSES}]({CAUSES.removeprefix('docs/')})."] if missed else []
    return "\n\n".join(["### Targets", shown, *explained])


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    timed = [row for row in rows if "median_us" in row]
    for op, part, mode in dict.fromkeys((row["op"], _part(row), row["mode"]) for row in timed):
        chosen = [row for row in timed if (row["op"], _part(row), row["mode"]) == (op, part, mode)]
        heading = ", ".join(filter(None, (op, part, mode)))
        yield f"### {heading}\n\n{_op_table(chosen)}"
        held = [row for row in chosen if "state_bytes_per_element" in row]
        if held:
            yield f"Bytes of optimizer state per parameter element:\n\n{_state_table(held)}"
        if peaks := [row for row in chosen if "peak_bytes" in row]:
            yield f"Peak memory of a process that holds the contender alone:\n\n{_memory_table(peaks)}"


def _part(row: Row) -> str:
    """Return which part of an op a contender computes, "" if all of it: only contenders of one part compare."""
    return next((part for part in PARTS if row["contender"].endswith(f", {part}")), "")


def _memory_table(rows: Sequence[Row]) -> str:
    return table(
        ["case", "contender", "peak memory, MB"],
        [[row["case"], row["contender"], f"{row['peak_bytes'] / 1e6:.0f}"] for row in rows],
    )


def _op_table(rows: Sequence[Row]) -> str:
    """Return a table with a line for each case, or, of WHOLE_MODELS, for each case and contender of ours."""
    part = _part(rows[0])
    whole_model = rows[0]["op"] in WHOLE_MODELS
    first = f"ours, {part}" if part else "ours"
    ours = [row for row in rows if (row["contender"].startswith("ours") if whole_model else row["contender"] == first)]
    names = dict.fromkeys(row["contender"] for row in rows)
    peers = [name for name in names if name != first and not (whole_model and name.startswith("ours"))]
    columns: list[tuple[str, Callable[[Row], str]]] = [("case", lambda row: row["case"])]
    if whole_model:
        columns.append(("contender", lambda row: row["contender"]))
    columns.append(("ours, ms (p10..p90)", _spread))
    if not part:  # earlier rows of parts have the rates of the whole op
        columns += _rate_columns(ours)
    if any("trained" in row for row in ours):
        columns.append(("trained parameters", lambda row: f"{row['trained']:,}" if "trained" in row else ""))
    columns += [(f"over {peer.removesuffix(f', {part}')}", partial(_speedup_over, peer)) for peer in peers]
    return table([name for name, _ in columns], [[cell(row) for _, cell in columns] for row in ours])


def _rate_columns(rows: Sequence[Row]) -> Iterator[tuple[str, Callable[[Row], str]]]:
    """Yield the columns of rates, without those that are zero in all rows."""
    if any(row["gbps"] for row in rows):
        yield "GB/s", lambda row: f"{row['gbps']:.1f}"
    if any(row["gflops"] for row in rows):
        yield "GFLOP/s", lambda row: f"{row['gflops']:.0f}"
    yield "of roofline", lambda row: f"{row['roofline']:.0%}"


def _state_table(rows: Sequence[Row]) -> str:
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    bytes_of = {(row["case"], row["contender"]): f"{row['state_bytes_per_element']:.2f}" for row in rows}
    cases = dict.fromkeys(row["case"] for row in rows)
    lines = [[case, *(bytes_of.get((case, c), "") for c in contenders)] for case in cases]
    return table(["case", *contenders], lines)


def _faults(rows: Sequence[Row]) -> Iterator[str]:
    red = [row for row in rows if row["gate"] != "green"]
    faults = [f"- {row['op']} {row['case']}, {row['contender']}: {row['gate']}" for row in red]
    if faults:
        yield "### Not timed: a wrong result or an error\n\n" + "\n".join(faults)


def _spread(row: Row) -> str:
    mark = " disturbed" if row["foreign"] > DISTURBED else ""
    return f"{_ms(row['median_us'])} ({_ms(row['p10_us'])}..{_ms(row['p90_us'])}){mark}"


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3g}" if microseconds < 1e6 else f"{microseconds / 1e3:.0f}"


def _speedup_over(peer: str, row: Row) -> str:
    return _ratio(row["speedup"].get(peer))


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


if __name__ == "__main__":
    raise SystemExit(main())
