"""Verdicts on targets, merging of runs, and tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import headlines, limits, machine, report, without_avx512
from bench.row_file import read_rows, write_rows
from bench.suites import suites
from bench.targets import TARGETS, judge
from bench.targets.target import AMX, AVX512_BF16, EVERY_MACHINE, FMA

ROOT = Path(__file__).parents[2]
RESULTS = report.committed_files()

ROW = {
    "op": "linear_nf4",
    "case": "4096x4096 M1 bf16",
    "M": 1,
    "N": 4096,
    "K": 4096,
    "dtype": "bfloat16",
    "forced_isa": None,
    "contender": "ours",
    "threads": 2,
    "mode": "cold",
    "gate": "green",
    "median_us": 200.0,
    "p10_us": 190.0,
    "p90_us": 250.0,
    "foreign": 0.01,
    "gbps": 43.0,
    "gflops": 168.0,
    "fraction": {"read": 0.9, "bf16": 0.2},
    "roofline": 0.9,
    "speedup": {"bnb eval": 1.4, "dense": 3.0},
    "machine": "a machine",
    "isa": "avx512_bf16",
    "commit": "0123456789",
    "versions": {"torch": "2"},
}


def verdict(name, rows):
    return next(v for v in judge(rows) if v.target.name == name)


def test_names_are_unique():
    names = [(target.name, target.stretch) for target in TARGETS]
    assert len(set(names)) == len(names)


def test_targets_apply_to_rows_of_their_machines():
    avx2 = {**ROW, "isa": "avx2", "case": "4096x4096 M64 fp32", "M": 64, "dtype": "float32", "speedup": {"dense": 0.95}}
    name = "forward, fp32 x, M >= 64 over dense"
    assert verdict(name, [avx2]).status == "met"
    assert verdict(name, [{**avx2, "speedup": {"dense": 0.8}}]).status == "missed"
    assert verdict(name, [{**avx2, "forced_isa": "avx2"}]).status == "not measured"  # dense is not limited
    assert verdict(name, [{**avx2, "isa": "avx512_bf16"}]).status == "not measured"
    assert verdict(name, [{**avx2, "isa": "avx512_bf16_fma"}]).status == "met"  # Intel without usable AMX
    assert verdict("forward M 1..8 over bnb eval", [{**ROW, "isa": "amx_bf16"}]).status == "not measured"
    assert EVERY_MACHINE.has(avx2)
    assert {target.machine for target in TARGETS} == {EVERY_MACHINE, AMX, AVX512_BF16, FMA}
    assert "| AVX512-BF16 " in report.report([ROW])


def test_rows_of_a_limit_are_kept_apart(monkeypatch):
    assert limits.limit() is None
    name = machine.provenance("cpu")["machine"]
    for variable, value in limits.LIMITS["avx2"].items():
        monkeypatch.setenv(variable, value)
    assert limits.limit() == "avx2"
    assert [peer.name for peer in suites()["linear_nf4"].contenders if limits.obeys(peer)] == ["ours", "dense"]
    limited = machine.provenance("cpu")["machine"]
    assert limited == f"{name}, limited to AVX2"
    row = {**ROW, "machine": limited, "isa": "avx2", "speedup": {"dense": 0.5}}
    assert len(report.merge([ROW, row])) == 2
    assert headlines.headlines([ROW, row]) == headlines.headlines([ROW])
    assert headlines.peers_ahead([ROW, row]) == headlines.peers_ahead([ROW])


def test_table_without_avx512():
    assert without_avx512.without_avx512([ROW]) == without_avx512.NO_ROWS
    row = {**ROW, "machine": "a laptop", "isa": "avx2", "M": 64, "mode": "warm", "speedup": {"dense": 2.0}}
    rows = [{**row, "dtype": "float32", "median_us": 2000.0, "speedup": {"dense": 0.95}}, row]
    text = without_avx512.without_avx512(rows)
    assert text.startswith("a laptop; medians in ms, warm weights. The smallest ratio to dense fp32 is 0.95x.")
    assert columns(text, "4096 x 4096") == ["4096 x 4096", "64", "2", "1.9", "0.95x", "0.2", "0.4", "2.00x"]


def test_target_verdict_uses_worst_row():
    assert verdict("forward M 1..8 over bnb eval", [ROW]).status == "met"
    missed = verdict("forward M 1..8 over bnb eval", [ROW, {**ROW, "mode": "warm", "speedup": {"bnb eval": 1.1}}])
    assert (missed.status, missed.kept, missed.measured[0][1]) == ("missed", 1, 1.1)
    assert verdict("forward M 1 cold over dense", [ROW]).status == "missed"
    assert verdict("AdamW step, fp32 states, over torch", [ROW]).status == "not measured"


def test_upper_bound_verdict_uses_largest_value():
    row = {**ROW, "op": "linear_nf4_lora", "speedup": {"ours without LoRA": 0.95}}
    slow = {**row, "speedup": {"ours without LoRA": 0.5}}
    assert verdict("LoRA beside our plain layer", [row]).status == "met"
    assert verdict("LoRA beside our plain layer", [row, slow]).measured[0][1] == 2.0


def test_unreachable_targets_reported_separately():
    slow = {**ROW, "roofline": 0.5, "speedup": {"bnb eval": 0.6}}
    near = {**ROW, "roofline": 0.95, "speedup": {"bnb eval": 1.2}}
    assert verdict("forward M 1..8 over bnb eval", [near]).reachable == 0  # 1.26 at the roofline
    assert verdict("forward M 1..8 over bnb eval", [{**slow, "speedup": {"bnb eval": 0.7}}, slow]).reachable == 1
    assert verdict("forward M 1..8 over bnb eval", [{**near, "roofline": 1.2}]).reachable == 0
    lora = {**ROW, "op": "linear_nf4_lora", "roofline": 0.8, "speedup": {"ours without LoRA": 0.75}}
    assert verdict("LoRA beside our plain layer", [lora]).reachable == 1


def test_runs_merge_to_medians():
    runs = [{**ROW, "median_us": us, "speedup": {"dense": s}} for us, s in ((100.0, 2.0), (300.0, 6.0), (120.0, 5.0))]
    (merged,) = report.merge(runs)
    assert merged["median_us"] == 120.0
    assert merged["speedup"] == {"dense": 5.0}
    assert merged["runs"] == 3
    assert report.merge([merged, ROW])[0]["runs"] == 4


def test_disturbed_run_used_only_without_quieter_one():
    disturbed = {**ROW, "median_us": 900.0, "foreign": 0.5}
    assert report.merge([ROW, disturbed, disturbed])[0]["median_us"] == ROW["median_us"]
    assert report.merge([disturbed])[0]["median_us"] == 900.0
    assert "(0.19..0.25) disturbed" in report.report([disturbed])


def test_report_shows_ratio_verdict_and_faults():
    red = {**ROW, "contender": "dense", "gate": "red: wrong"}
    del red["median_us"]
    text = report.report(report.merge([ROW, red]))
    assert "1.40" in text
    assert "| missed" in text
    assert "linear_nf4 4096x4096 M1 bf16, dense: red: wrong" in text


def test_tables_compare_ours_with_each_peer():
    text = report.report([ROW, {**ROW, "contender": "dense", "speedup": {}}])
    assert "| over dense |" in text
    assert "| 3.00x " in text


def test_a_page_is_updated_between_its_marks(tmp_path):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    rows.write_text(json.dumps(ROW) + "\n")
    begins = (headlines.BEGIN, headlines.BEGIN_AHEAD, without_avx512.BEGIN, report.BEGIN)
    page.write_text("before\n" + "".join(f"{begin}\nstale\n{report.END}\n" for begin in begins) + "after\n")
    report.main([str(rows), "--update", str(page)])
    text = page.read_text()
    assert text.startswith(f"before\n{headlines.BEGIN}\n\n| measured ")
    assert f"{headlines.ONE_MACHINE}\n\n{report.END}\n{headlines.BEGIN_AHEAD}\n" in text
    assert f"{report.BEGIN}\n\nNot measured on these machines yet: " in text
    assert "adamw_step (all contenders)" in text
    assert "\n\nMachine: a machine" in text
    assert text.endswith(f"\n\n{report.END}\nafter\n")  # a table ends at an empty line
    assert "stale" not in text


def columns(text, line):
    """Return the cells of the first table line that starts with `line`."""
    return [cell.strip() for cell in next(x for x in text.splitlines() if x.startswith(f"| {line}")).split("|")[1:-1]]


def test_headlines_of_two_machines_stand_side_by_side():
    other = {**ROW, "machine": "another machine", "isa": "amx_bf16", "speedup": {"bnb eval": 1.2, "dense": 0.8}}
    text = headlines.headlines([ROW, {**ROW, "op": "linear_nf4_lora"}, other])
    assert columns(text, "measured") == [
        *("measured", "peer", "a machine (avx512_bf16)", "another machine (amx_bf16)", "ours is ahead on")
    ]
    first, second = (line for line in text.splitlines() if line.startswith("| linear layer, 1 token"))
    assert columns(first, "")[1:] == ["bnb eval", "1.40x (0.2 ms)", "1.20x (0.2 ms)", "all"]
    assert columns(second, "")[1:] == ["dense", "3.00x (0.2 ms)", "0.80x (0.2 ms)", "a machine only"]
    assert headlines.ONE_MACHINE not in text


def test_headlines_name_what_one_of_two_machines_lacks():
    other = {**ROW, "machine": "another machine", "speedup": {"dense": 0.9}}
    text = headlines.headlines([ROW, other])
    assert columns(text, "linear layer")[2:] == ["1.40x (0.2 ms)", "not measured", "a machine; no other was measured"]
    assert headlines.headlines([{**ROW, "speedup": {}}]) == ""
    assert headlines.headlines([ROW]).endswith(headlines.ONE_MACHINE)


def test_memory_of_headlines_is_the_peers_over_ours():
    row = {**ROW, "op": "train_step", "case": headlines.LARGE, "contender": "ours, fused", "speedup": {}}
    text = headlines.headlines([{**row, "peak_bytes": 3.2e9, "memory_ratio": {"bnb + PEFT": 0.8}}])
    assert columns(text, "peak memory")[1:] == ["bnb + PEFT", "1.25x (3.20 GB)"]


def test_every_headline_has_a_committed_row():
    rows = [row for path in RESULTS for row in read_rows(path)]
    found = {headline: headline.of(rows) for headline in headlines.HEADLINES}
    for headline, row in found.items():
        assert row is not None, headline
        assert set(headline.peers) <= row[headline.field].keys(), headline


def test_cases_that_peers_win_are_listed():
    slow = {**ROW, "case": "576x576 M2 bf16", "speedup": {"bnb eval": 0.9, "dense": 1.5}}
    forced = {**ROW, "forced_isa": "portable", "speedup": {"dense": 0.1}}
    assert columns(headlines.peers_ahead([ROW, slow, forced]), "linear_nf4") == [
        *("linear_nf4", "ours", "bnb eval", "1 of 2", "0.90x", "576x576 M2 bf16 cold")
    ]
    assert headlines.peers_ahead([ROW, forced]) == ""
    assert "| another machine |" in headlines.peers_ahead([ROW, slow, {**slow, "machine": "another machine"}])


def test_report_includes_state_bytes():
    step = {**ROW, "op": "adamw_step", "case": "160M", "mode": "cold", "state_bytes_per_element": 8.0}
    text = report.report([step, {**step, "contender": "ours 8-bit", "state_bytes_per_element": 2.031}])
    assert "| 160M | 8.00 | 2.03       |" in text


def test_row_file_writes_provenance_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [ROW, {**ROW, "M": 2}, {**ROW, "isa": "avx512"}]
    write_rows(path, rows)
    assert list(read_rows(path)) == rows
    lines = path.read_text().splitlines()
    assert [("provenance" in json.loads(line)) for line in lines] == [True, False, False, True, False]
    assert "a machine" not in lines[1]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_missed_targets_of_committed_rows_have_documented_cause(path):
    page = (ROOT / report.CAUSES).read_text()
    explained = {name for heading in re.findall(r"^## (.+)$", page, re.MULTILINE) for name in heading.split("; ")}
    assert explained <= {target.name for target in TARGETS}
    verdicts = judge(read_rows(path))
    assert verdicts
    assert {verdict.target.name for verdict in verdicts if verdict.status == "missed"} <= explained


def test_contenders_of_one_part_are_compared_with_each_other():
    whole = {**ROW, "op": "attention", "mode": "warm", "speedup": {"torch": 2.0, "torch, forward": 0.5}}
    forward = {**whole, "contender": "ours, forward", "speedup": {"torch": 9.0, "torch, forward": 3.0}}
    peers = [{**whole, "contender": name, "speedup": {}} for name in ("torch", "torch, forward")]
    first, second = report.report([whole, forward, *peers], targets=False).split("### attention")[1:]
    assert first.startswith(", warm")
    assert ("| 2.00x " in first, "0.50x" in first, "9.00x" in first) == (True, False, False)
    assert second.startswith(", forward, warm")
    assert "| over torch |" in second
    assert ("| 3.00x " in second, "9.00x" in second, "GFLOP/s" in second) == (True, False, False)


def test_each_contender_of_ours_in_a_whole_model_has_a_line():
    step = {**ROW, "op": "train_step", "case": "a model", "mode": "cold", "speedup": {"bnb + PEFT": 1.5}}
    fused = {**step, "contender": "ours, fused", "speedup": {"bnb + PEFT": 2.5, "ours": 1.6}}
    text = report.report([step, fused, {**step, "contender": "bnb + PEFT", "speedup": {}}], targets=False)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| a model" in line]
    assert [(line[1], line[-1]) for line in lines] == [("ours", "1.50x"), ("ours, fused", "2.50x")]
    assert "over ours" not in text
