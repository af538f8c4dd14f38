"""Every claim is measured in its tiny form; runs resume; the report says what the rows say."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from bench.fidelity import __main__ as fidelity
from bench.fidelity import bits, error, finetuning
from bench.fidelity.claim import has_case
from bench.fidelity.claims import CLAIMS
from bench.fidelity.codes import CODES, indices, rounded
from bench.fidelity.report import report
from bench.row_file import read_rows
from qlora_kernels.format.nf4 import unpack

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def rows_of_every_claim():
    return list(fidelity.run(list(CLAIMS), [], quick=True))


def test_every_case_has_a_row_with_provenance(rows_of_every_claim):
    for name, claim in CLAIMS.items():
        rows = [row for row in rows_of_every_claim if row["claim"] == name]
        assert len(rows) == len(claim.cases(True)) > 0
        assert all(has_case(row, case) for row, case in zip(rows, claim.cases(True), strict=True))
        assert all({"time", "machine", "isa", "commit", "versions"} <= row.keys() for row in rows)


def test_report_has_a_part_for_each_measured_claim(rows_of_every_claim):
    assert "Claims without rows" in report(rows_of_every_claim, "FILE")  # quick rows are not results
    measured = [{**row, "quick": False} for row in rows_of_every_claim if row["claim"] != "scale"]
    text = report(measured, "FILE")
    assert "Claims without rows: `scale`." in text
    for name, claim in CLAIMS.items():
        assert (f"## {claim.title}\n" in text) == (name != "scale")
    assert "python -m bench.fidelity start --out FILE" in text
    assert "Not measured, 18 of 18 cases" in text  # the tiny form of `finetuning` takes other numbers of steps


def test_a_run_continues_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert fidelity.main(["memory", "--quick", "--out", str(out)]) == 0
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:3]))  # provenance and two of four rows
    fidelity.main(["memory", "--quick", "--out", str(out)])
    assert [row["model"] for row in read_rows(out)] == ["7B", "13B", "33B", "65B"]
    complete = out.read_text()
    fidelity.main(["memory", "--quick", "--out", str(out)])
    assert out.read_text() == complete


def test_unknown_claims_are_refused():
    with pytest.raises(SystemExit, match=r"CLAIM must be one of bits, .*, got nothing"):
        fidelity.main(["nothing"])


@pytest.mark.parametrize("kind", CODES)
def test_weights_are_rounded_to_the_nearest_value(kind):
    w = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    w[1] = 0.0
    got = rounded(w, kind, 64)
    assert got.shape == w.shape
    flat = torch.nn.functional.pad(w.reshape(-1), (0, 12)).view(-1, 64)
    values = flat.abs().amax(dim=1)[:, None, None] * torch.tensor(CODES[kind])
    nearest = (flat[..., None] - values).abs().amin(dim=2).reshape(-1)[:500]
    torch.testing.assert_close((got - w).abs().reshape(-1), nearest, rtol=0, atol=1e-6)


def test_nf4_indices_are_the_codecs():
    w = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    packed, _ = qk.quantize_nf4(w)
    assert torch.equal(indices(w, "NF4", 64), unpack(packed, w.numel()).long())


def test_bits_follow_the_formula():
    assert bits.formula(64, True) == pytest.approx(4.12695, abs=1e-5)
    (row,) = bits.measure([{"weights": bits.SQUARE, "blocksize": 64, "double_quant": False}], True)
    assert row["bits"] == bits.formula(64, False) == 4.5


def error_rows(**rms):
    base = {"weights": error.NORMAL, "blocksize": 64, "mean_absolute": 0.1, "entropy": 3.9}
    return [{**base, "type": kind, "rms": rms.get(kind.split()[0], 0.1)} for kind in CODES]


def test_findings_follow_the_rows():
    smallest = error.judge(error_rows(NF4=0.09))[0]
    assert (smallest.holds, smallest.verdict) == (True, "holds")
    largest = error.judge(error_rows(NF4=0.11))[0]
    assert (largest.holds, largest.verdict) == (False, "does not hold here")


def finetuning_rows(*differences, data="language reference"):
    def row(variant, seed, before, after):
        return {"data": data, "variant": variant, "seed": seed, "before": before, "after": after}

    sixteen = [row(finetuning.SIXTEEN, seed, 12.0, 10.0) for seed in range(len(differences))]
    return sixteen + [row(finetuning.FOUR, seed, 15.0, 10.0 + more) for seed, more in enumerate(differences)]


def test_fine_tuning_is_judged_against_the_spread_of_the_seeds():
    assert [finding.holds for finding in finetuning.judge(finetuning_rows(0.1, -0.1, 0.05))] == [True]
    assert [finding.holds for finding in finetuning.judge(finetuning_rows(1.0, 1.1, 0.9))] == [False]
    assert [finding.holds for finding in finetuning.judge(finetuning_rows(1.0))] == [None]


def test_fine_tuning_on_another_text_is_judged_separately():
    rows = finetuning_rows(0.1, -0.1, 0.05) + finetuning_rows(1.0, 1.1, 0.9, data="movie reviews")
    first, second = finetuning.judge(rows)
    assert (first.holds, second.holds) == (True, False)
    assert second.statement.endswith("on the movie reviews")
    assert "before training the difference was +3.000" in second.measured
