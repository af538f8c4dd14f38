"""Every claim is measured in its tiny form; runs resume; the report says what the rows say."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from bench.fidelity import __main__ as fidelity
from bench.fidelity import adalora, bits, classification, error, finetuning, lowrank, rates, rslora, subject
from bench.fidelity.claim import PAPERS, has_case
from bench.fidelity.claims import CLAIMS
from bench.fidelity.codes import CODES, indices, rounded
from bench.fidelity.report import report
from bench.fidelity.seeds import Differences, differences
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
    assert f"Measured {rows_of_every_claim[0]['time'][:10]} on {rows_of_every_claim[0]['machine']}" in text
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
    assert [finding.holds for finding in finetuning.judge(finetuning_rows(0.05, -0.05, 0.02))] == [True]
    assert [finding.holds for finding in finetuning.judge(finetuning_rows(1.0, 1.1, 0.9))] == [False]
    assert [finding.holds for finding in finetuning.judge(finetuning_rows(1.0))] == [None]


def test_fine_tuning_on_another_text_is_judged_separately():
    rows = finetuning_rows(0.05, -0.05, 0.02) + finetuning_rows(1.0, 1.1, 0.9, data="movie reviews")
    first, second = finetuning.judge(rows)
    assert (first.holds, second.holds) == (True, False)
    assert second.statement.endswith("on the movie reviews")
    assert "before training the difference was +3.000" in second.measured


def test_every_statement_names_a_paper_and_the_command(rows_of_every_claim):
    measured = [{**row, "quick": False} for row in rows_of_every_claim]
    findings = {name: claim.judge([row for row in measured if row["claim"] == name]) for name, claim in CLAIMS.items()}
    assert {finding.paper for of in findings.values() for finding in of} <= PAPERS.keys()
    summary = report(measured, "FILE").split("\n\n")[3].splitlines()[2:]
    assert len(summary) == sum(map(len, findings.values()))
    assert all(f"`python -m bench.fidelity {name}`" in "".join(summary) for name, of in findings.items() if of)


def test_differences_decide_only_beyond_the_spread_of_the_seeds():
    low, high, noise, single = (Differences(of) for of in ((-1.0, -1.1), (1.0, 1.1), (-1.0, 1.1), (-5.0,)))
    assert [of.is_below_zero() for of in (low, high, noise, single)] == [True, False, None, None]
    assert [of.is_at_most(0.5) for of in (low, high, noise, single)] == [None, False, None, None]
    assert Differences((0.0, 0.0)).is_at_most(0.5) is None  # two seeds may be equal by chance
    assert Differences((-1.0, -1.1, -1.2)).is_at_most(0.5) is True
    assert Differences((0.0, 0.2, 0.3)).is_at_most(0.6) is True  # not decided, but within the tolerance
    assert Differences((0.0, 0.2, 0.3)).is_at_most(0.5) is None
    assert Differences((-1.0, -1.5)).is_below_zero() is None  # two seeds need nine standard deviations
    assert Differences((-1.0, -1.5)).words(1) == "-1.2 over 2 seeds, 95 % interval -4.4 to +1.9"
    assert single.words(0) == "-5 with one seed"
    rows = [{"m": "a", "seed": seed, "x": seed} for seed in (0, 1, 2)] + [{"m": "b", "seed": 1, "x": 4.0}]
    assert differences(rows, "x", {"m": "a"}, {"m": "b"}) == Differences((-3.0,))
    assert differences(rows, "x", {"m": "a"}, {"m": "c"}) is None


def test_principal_part_and_residual_start_closer_to_the_weights_than_nf4():
    dense = {name: layer.weight.float() for name, layer in subject.linears(subject.model(quick=True)).items()}

    def errors(method):
        merged = lowrank.start(method, 8, quick=True).merge_and_unload()
        return {name: (merged.get_submodule(name).weight.float() - weight).norm() for name, weight in dense.items()}

    nf4 = errors(lowrank.LORA)
    for method in lowrank.FROM_WEIGHTS:
        assert all(error < 0.97 * nf4[name] for name, error in errors(method).items()), method


def lowrank_rows(**after):
    return [
        {"method": method, "r": r, "seed": seed, "before": 20.0 - (method == "PiSSA"), "after": value + seed / 10}
        for method, values in after.items()
        for r, value in zip(lowrank.RANKS, values, strict=True)
        for seed in lowrank.SEEDS
    ]


def test_methods_of_low_rank_are_judged_at_every_rank():
    found = lowrank.judge(lowrank_rows(LoRA=(10.0, 9.0), DoRA=(9.0, 8.0), LoftQ=(11.0, 8.0), PiSSA=(9.0, 9.0)))
    verdicts = {(finding.paper, finding.statement.split()[0]): finding.holds for finding in found}
    assert verdicts["DoRA", "DoRA"] is True
    assert verdicts["LoftQ", "LoftQ"] is False  # higher at r = 2
    assert [finding.holds for finding in found if finding.statement.startswith("PiSSA")] == [None, False]
    assert [finding.holds for finding in found if finding.statement.startswith("Before")] == [False, True]


def test_scalings_are_judged_by_gradients_and_perplexity():
    rows = [
        {"use_rslora": use_rslora, "r": r, "seed": seed, "after": after + seed / 10, "gradient_norm": norm}
        for use_rslora, r, after, norm in (
            (False, 8, 10, 1.0),
            (False, 64, 11, 0.3),
            (True, 8, 10, 2.0),
            (True, 64, 9, 2.1),
        )
        for seed in rslora.SEEDS
    ]
    assert [finding.holds for finding in rslora.judge(rows)] == [True] * 4
    assert "multiplied by 0.30 at alpha / r and by 1.05" in rslora.judge(rows)[0].measured
    assert [finding.holds for finding in rslora.judge(rows[::2])] == [True, None, None, None]  # one seed


def test_methods_are_compared_with_full_fine_tuning():
    def rows(method, *accuracies, lr=None):
        row = {"method": method, "lr": lr or rates.rate(method)}
        return [row | {"seed": seed, "accuracy": value} for seed, value in enumerate(accuracies)]

    found = classification.judge(
        [
            *rows("full", 80.0, 80.0, 80.0),
            *rows("lora", 79.9, 80.3, 80.1),
            *rows("bitfit", 72.0, 73.0, 72.0),
            *rows("bitfit", 50.0, 50.0, 50.0, lr=1.0),  # a rate that was not chosen is not judged
            *rows("prefix", 80.0, 70.0, 85.0),
            *rows("p-tuning-v2", 70.0, 50.0, 60.0),
        ]
    )
    assert [(finding.paper, finding.holds) for finding in found] == [
        ("LoRA", True),
        ("BitFit", False),
        ("Prefix tuning", None),
        ("P-Tuning v2", None),
    ]


def test_learning_rates_are_chosen_on_other_seeds_and_reviews():
    assert not set(rates.SEEDS) & set(classification.sentiment.SEEDS)
    measured = [row for row in read_rows(fidelity.RESULTS) if row["claim"] == "rates"]
    assert {method: rates.best(measured, method) for method in rates.GRID} == rates.CHOSEN
    tried = {(row["method"], row["lr"]): row["accuracy"] for row in measured if row["seed"] == rates.FIRST}
    for method, grid in rates.GRID.items():
        bound = max(tried[method, lr] for lr in grid) - rates.MARGIN
        assert all((rates.SECOND in seeds) == (tried[method, lr] >= bound) for lr, seeds in grid.items())


def test_ranks_of_adalora_are_compared_over_the_seeds():
    layers = [
        f"bert.encoder.layer.{block}.{kind}" for block in (0, 1) for kind in ("attention.self.query", "output.dense")
    ]
    rows = [
        {"method": adalora.ADALORA, "seed": seed, "accuracy": 80.0, "ranks": dict(zip(layers, ranks, strict=True))}
        for seed, ranks in enumerate(((1, 5, 3, 9), (2, 6, 4, 10)))
    ]
    rows += [{"method": adalora.LORA, "seed": seed, "accuracy": 79.0 - seed / 10} for seed in (0, 1)]
    assert [finding.holds for finding in adalora.judge(rows)] == [True, True, True]
    assert adalora.mean_ranks(rows)["bert.encoder.layer.1.output.dense"] == 9.5
    assert adalora.PICTURE in adalora.show(rows)
