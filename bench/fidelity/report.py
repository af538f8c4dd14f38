"""Generate docs/fidelity.md from rows: the verdicts of all claims, then one section per claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..markdown import table
from ..row_file import Row
from .claim import PAPERS, Claim, Finding, has_case
from .claims import CLAIMS

BEGIN, END = "<!-- begin: python -m bench.fidelity report -->", "<!-- end -->"


def report(rows: Sequence[Row], results: str) -> str:
    """Return the generated part of the page.   rows: of any claims; quick rows are omitted.   results: their file."""
    of = {name: [row for row in rows if row["claim"] == name and not row["quick"]] for name in CLAIMS}
    measured = {name: claim for name, claim in CLAIMS.items() if of[name]}
    findings = {name: claim.judge(of[name]) for name, claim in measured.items()}
    parts = ["## Verdicts", _count(findings), _verdicts(findings)]
    if missing := [name for name in CLAIMS if name not in measured]:
        parts.append(f"Claims without rows: {', '.join(f'`{name}`' for name in missing)}.")
    for name, claim in measured.items():
        parts += _part(claim, of[name], findings[name], results)
    return "\n\n".join(parts)


def _verdicts(findings: dict[str, Sequence[Finding]]) -> str:
    """Return the summary table: one line per statement, with the command that measures its claim.

    The element around it is for docs/assets/site.css: the statements are long sentences.
    """
    lines = [
        [finding.statement, finding.verdict, _link(finding.paper), f"`python -m bench.fidelity {name}`"]
        for name, of in findings.items()
        for finding in of
    ]
    shown = table(["statement", "verdict", "paper", "command"], lines)
    return f'<div class="sentences" markdown>\n\n{shown}\n\n</div>'


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{PAPERS[paper]})"


def _count(findings: dict[str, Sequence[Finding]]) -> str:
    """Return a line with the number of statements of each verdict."""
    verdicts = [finding.verdict for of in findings.values() for finding in of]
    counts = ", ".join(f"{verdict}: {number}" for verdict, number in Counter(verdicts).items())
    return f"Statements: {len(verdicts)}; {counts}."


def _part(claim: Claim, rows: Sequence[Row], findings: Sequence[Finding], results: str) -> list[str]:
    verdicts = [f"- {of.statement}: **{of.verdict}**. {of.measured[:1].upper()}{of.measured[1:]}." for of in findings]
    parts = [
        f"## {claim.title}",
        f"Source: {claim.source}.",
        claim.method,
        claim.table(rows),
        "\n".join(verdicts),
        f"```bash\npython -m bench.fidelity {claim.name} --out {results}\n```",
        _unmeasured(claim, rows),
        _provenance(rows),
    ]
    return list(filter(None, parts))


def _unmeasured(claim: Claim, rows: Sequence[Row]) -> str:
    """Return a line with the cases that have no row, because the verdict then covers only a part of them."""
    cases = claim.cases(False)
    missing = [case for case in cases if not any(has_case(row, case) for row in rows)]
    if not missing:
        return ""
    differing = [name for name in cases[0] if any(case.get(name) != cases[0][name] for case in cases)]
    groups: dict[str, list[str]] = {}
    for case in missing:
        words = ", ".join(f"{name} {case[name]}" for name in differing if name in case and name != "seed")
        groups.setdefault(words, []).extend([str(case["seed"])] if "seed" in case else [])
    listed = "; ".join(words + (f", seed {', '.join(seeds)}" if seeds else "") for words, seeds in groups.items())
    return f"Not measured, {len(missing)} of {len(cases)} cases: {listed}."


def _provenance(rows: Sequence[Row]) -> str:
    """Return the line that names the days, machines, commits and torch versions of the rows."""
    days = sorted({row["time"][:10] for row in rows})
    machines = ", ".join(dict.fromkeys(f"{row['machine']} ({row['isa']})" for row in rows))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    torches = ", ".join(dict.fromkeys(row["versions"]["torch"] for row in rows))
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    return f"Measured {when} on {machines}; commit {commits}; torch {torches}."
