"""bench.compare and bench.ratio_gate on given rows: nothing is timed."""

from __future__ import annotations

import pytest

from bench import compare, ratio_gate
from bench.ratio_gate import HEADLINES, Ratio, compared
from bench.report import committed_files
from bench.row_file import read_rows
from qlora_kernels.cli import bench as command

OP, CASE, MODE = HEADLINES[0]


def row(contender, microseconds, **fields):
    return {"op": OP, "case": CASE, "mode": MODE, "contender": contender, "median_us": microseconds, **fields}


def test_two_trees_are_compared_by_the_medians_of_their_rounds():
    there, here = {}, {}
    for ours, bnb in ((300.0, 1000.0), (900.0, 1000.0), (310.0, 1000.0)):
        compare.collect([row("ours", ours), row("bnb", bnb), {"op": "peak", "case": "read"}], there)
        compare.collect([row("ours", ours / 2), row("bnb", bnb)], here)
    (line,) = compare.show("REF", there, here).splitlines()[2:]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["0.31", "0.155", "2.00x", "1.00x"]


def test_the_order_of_the_trees_alternates():
    trees = {"REF": "a", "here": "b"}
    assert [[name for name, _ in compare.in_turn(trees, n)] for n in (0, 1)] == [["REF", "here"], ["here", "REF"]]


def test_an_unknown_commit_is_refused():
    with pytest.raises(SystemExit, match="REF must be a commit of this repository, got 'no-such-commit'"):
        compare.main(["no-such-commit"])


def test_a_ratio_is_kept_down_to_the_slack():
    committed = [row("ours", 1.0, speedup={"bnb": 4.0, "ours, other": 1.0}), row("bnb", 4.0, speedup={"ours": 0.25})]
    for measured, kept in ((3.0, True), (2.99, False)):
        ((_, ratio),) = compared(committed, [row("ours", 9.0, speedup={"bnb": measured})])
        assert ratio.kept == kept
        assert ("kept" in str(ratio)) == kept
    ((_, ratio),) = compared(committed, [])
    assert ratio == Ratio(f"{OP} {CASE} {MODE} over bnb", 4.0, None)
    assert not ratio.kept


def test_every_headline_has_a_committed_row():
    keys = {ratio_gate._key(row) for path in committed_files() for row in read_rows(path) if row["contender"] == "ours"}
    assert set(HEADLINES) <= keys


def test_the_gate_fails_only_what_fails_twice(monkeypatch, capsys):
    headlines = [key for key in HEADLINES if key[0] in ("quantize_nf4", "dequantize_nf4")]
    monkeypatch.setattr(ratio_gate, "HEADLINES", tuple(headlines))
    monkeypatch.setattr(ratio_gate, "cpu_isa", lambda: "avx512_bf16")
    asked = []

    def fake(second):
        def run(device, only, **options):
            asked.append(only)
            ratio = 1000.0 if len(asked) > 1 and second else 0.001
            for op, case, mode in headlines:
                of = {"bnb": 1000.0 if op == "quantize_nf4" else ratio}
                yield {"op": op, "case": case, "mode": mode, "contender": "ours", "speedup": of}

        return run

    monkeypatch.setattr(ratio_gate, "run", fake(second=True))
    assert ratio_gate.main() == 0
    assert "quantize" in asked[0]
    assert asked[1].startswith("^(dequantize")
    asked.clear()
    monkeypatch.setattr(ratio_gate, "run", fake(second=False))
    assert ratio_gate.main() == 1
    monkeypatch.setattr(ratio_gate, "cpu_isa", lambda: "another")
    assert ratio_gate.main() == 2


@pytest.mark.parametrize(
    ("words", "module", "rest"),
    [
        (["report", "--help"], "bench.report", ["--help"]),
        (["compare", "HEAD"], "bench.compare", ["HEAD"]),
        (["--", "cpu", "--quick"], "bench.run", ["cpu", "--quick"]),
        ([], "bench.run", []),
    ],
)
def test_subcommands_of_bench(words, module, rest, monkeypatch):
    called = []

    def run(arguments, **options):
        called.append(arguments)
        return type("Done", (), {"returncode": 3})

    monkeypatch.setattr(command.subprocess, "run", run)
    assert command.run(type("Arguments", (), {"rest": words})) == 3
    assert called[0][1:] == ["-m", module, *rest]
