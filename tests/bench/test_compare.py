"""bench.compare and bench.ratio_gate on given rows: nothing is timed."""

from __future__ import annotations

import pytest

from bench import compare, ratio_gate
from bench.ratio_gate import HEADLINES, Ratio, compared
from bench.report import committed_files
from bench.row_file import read_rows
from bench.suites import suites
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


COMMITTED = [row("ours", 1.0, speedup={"bnb": 4.0, "ours, other": 1.0}), row("bnb", 4.0, speedup={"ours": 0.25})]


def test_a_ratio_is_kept_down_to_the_slack():
    for measured, kept in ((3.0, True), (2.99, False)):
        (ratio,) = compared(COMMITTED, [row("ours", 9.0, speedup={"bnb": measured})])
        assert ratio.kept == kept
        assert ("kept" in str(ratio)) == kept


def test_a_case_without_a_correct_result_of_ours_fails():
    (ratio,) = compared(COMMITTED, [row("bnb", 9.0, speedup={})])
    assert ratio == Ratio(f"{OP} {CASE} {MODE} over bnb", 4.0, None)
    assert not ratio.kept
    assert "not measured" in str(ratio)


def test_missing_peer_is_not_compared(capsys):
    assert compared(COMMITTED, [row("ours", 9.0, speedup={})]) == []
    assert "bnb was not measured" in capsys.readouterr().err


def test_the_smallest_committed_ratio_of_several_machines_counts():
    other = row("ours", 1.0, speedup={"bnb": 2.0})
    (ratio,) = compared([*COMMITTED, other], [row("ours", 9.0, speedup={"bnb": 1.6})])
    assert (ratio.committed, ratio.kept) == (2.0, True)


def test_every_headline_has_a_committed_row():
    keys = {ratio_gate._key(row) for path in committed_files() for row in read_rows(path) if row["contender"] == "ours"}
    assert set(HEADLINES) <= keys


def test_every_headline_is_a_case_of_its_suite():
    for op, case, mode in HEADLINES:
        assert case in {of.name for of in suites()[op].cases("cpu")}
        assert mode in suites()[op].modes


def gate(monkeypatch, ratios):
    """Run the gate with `ratios`: op -> ratio over bnb of each measurement. Return its code and what it measured."""
    asked = []

    def measure(headline, committed, seconds):
        asked.append((headline[0], seconds))
        return [row("ours", 1.0, speedup={"bnb": ratios[headline[0]].pop(0)})]

    monkeypatch.setattr(ratio_gate, "HEADLINES", tuple(key for key in HEADLINES if key[0] in ratios))
    monkeypatch.setattr(ratio_gate, "cpu_isa", lambda: "avx512_bf16")
    monkeypatch.setattr(ratio_gate, "measure", measure)
    return ratio_gate.main(), asked


def test_the_gate_measures_a_ratio_below_its_bound_again(monkeypatch):
    code, asked = gate(monkeypatch, {"quantize_nf4": [1000.0], "dequantize_nf4": [0.001, 1000.0]})
    assert code == 0
    assert asked == [("quantize_nf4", 2.0), ("dequantize_nf4", 2.0), ("dequantize_nf4", 4.0)]


def test_the_gate_fails_for_a_ratio_below_its_bound_twice(monkeypatch, capsys):
    code, asked = gate(monkeypatch, {"quantize_nf4": [1000.0], "dequantize_nf4": [0.001, 0.001]})
    assert code == 1
    assert len(asked) == 3
    assert "below 75% of it" in capsys.readouterr().out


def test_the_gate_compares_nothing_without_rows_of_the_instruction_set(monkeypatch, capsys):
    monkeypatch.setattr(ratio_gate, "cpu_isa", lambda: "another")
    assert ratio_gate.main() == 2
    assert "no committed rows for the instruction set another" in capsys.readouterr().err


def test_a_headline_is_measured_in_its_mode_with_the_committed_contenders(monkeypatch):
    measured = []

    def run_case(suite, case, peaks, budget):
        measured.append(([contender.name for contender in suite.contenders], suite.modes, case.name, peaks))
        return iter(())

    monkeypatch.setattr(ratio_gate, "run_case", run_case)
    peak = {"op": "peak", "case": "read", "mode": None, "forced_isa": None, "rate": 30.0, "contender": "probe"}
    ratio_gate.measure((OP, CASE, MODE), [peak, row("ours", 1.0), row("bnb", 2.0)], 1.0)
    (contenders, modes, case, peaks) = measured[0]
    assert (contenders, modes, case) == (["ours", "bnb"], (MODE,), CASE)
    assert peaks["read"].rate == 30e9


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
