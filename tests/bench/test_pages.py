"""The committed pages are what `make bench-report` writes from the committed rows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import report
from bench.fidelity import __main__ as fidelity
from bench.fidelity import bits, finetuning
from bench.fidelity.claim import find
from bench.row_file import read_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("page", "write"),
    [
        ("benchmarks.md", lambda copy: report.main(["--update", str(copy)])),
        ("fidelity.md", lambda copy: fidelity.main(["report", "--update", str(copy)])),
    ],
    ids=["benchmarks", "fidelity"],
)
def test_committed_page_equals_generated_page(page, write, tmp_path):
    copy = tmp_path / page
    shutil.copy(ROOT / "docs" / page, copy)
    write(copy)
    assert copy.read_text() == (ROOT / "docs" / page).read_text(), "run `make bench-report`"


def test_figures_of_the_readme_are_those_of_the_rows():
    readme = (ROOT / "README.md").read_text()
    rows = list(read_rows(report.FIDELITY))
    base = find(rows, claim="perplexity", type="bf16")
    assert base is not None
    assert f"16-bit base | {base['perplexity']:.3f} |" in readme
    weights = find(rows, claim="bits", weights=bits.MODEL, double_quant=True)
    assert weights is not None
    assert f"{2 * weights['parameters'] / 1e6:.1f} MB in 16 bits, {weights['bytes'] / 1e6:.1f} MB in NF4" in readme
    ratio = 2 * weights["parameters"] / weights["bytes"]
    assert f"in NF4 ({ratio:.2f}x) |" in readme
    base = find(rows, claim="perplexity", type="NF4 + DQ", blocksize=64)
    assert base is not None
    # The demo computes with the kernels, the row with the dequantized weights.
    assert [float(figure) for figure in re.findall(r"\| NF4 base \| ([\d.]+) \|", readme)] == [
        pytest.approx(base["perplexity"], rel=1e-3)
    ]
    trained = {row["trained"] for row in rows if row["claim"] == "finetuning" and row["variant"] == finetuning.FOUR}
    assert [f"| trained parameters | {count:,} |" in readme for count in trained] == [True]
    square = find(rows, claim="bits", weights=bits.SQUARE, blocksize=64, double_quant=True)
    assert square is not None
    assert f"{square['bits']:.3f} bits per weight for large tensors" in readme
    seconds = {
        row["contender"]: f"{row['median_us'] / 1e6:.1f} s"
        for path in report.committed_files()
        for row in read_rows(path)
        if row["op"] == "train_step" and row["case"].startswith("SmolLM2-135M")
    }
    gigabytes = {
        row["contender"]: f"{row['peak_bytes'] / 1e9:.2f} GB"
        for path in report.committed_files()
        for row in read_rows(path)
        if row["op"] == "train_step" and row["case"].startswith("SmolLM2-135M") and "peak_bytes" in row
    }
    contenders = ("ours", "ours, fused", "bnb + PEFT")
    ours, fused, peer = (gigabytes[name] for name in contenders)
    assert f"| {ours}, with `--fuse` {fused}; bitsandbytes + PEFT {peer} (`make bench`) |" in readme
    ours, fused, peer = (seconds[name] for name in contenders)
    assert f"| {ours}, with `--fuse` {fused}; bitsandbytes + PEFT {peer} (`make bench`) |" in readme


@pytest.mark.parametrize(("page", "count"), [("benchmarks.md", 3), ("fidelity.md", 1)])
def test_pictures_of_the_pages_exist(page, count):
    pictures = re.findall(r"\((assets/[\w-]+\.svg)\)", (ROOT / "docs" / page).read_text())
    assert len(pictures) == count
    assert all((ROOT / "docs" / picture).is_file() for picture in pictures)


def test_pictures_are_drawn_from_rows(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import pictures

    rows = [
        {"op": "peak", "case": "bf16", "rate": 400.0, "forced_isa": None, "contender": "probe", "machine": "m"},
        {"op": "peak", "case": "read", "rate": 40.0, "forced_isa": None, "contender": "probe", "machine": "m"},
    ]
    for m in (1, 64):
        for contender in ("ours", "dense", "torchao", "oneDNN int8"):
            rows.append(
                {
                    **{"op": "linear_nf4", "machine": "m", "mode": "cold", "forced_isa": None, "dtype": "bfloat16"},
                    **{"M": m, "N": 4096, "K": 4096, "contender": contender, "median_us": 100.0 * m},
                    **{"gflops": 300.0, "gbps": 30.0 / m},
                }
            )
    drawn = pictures.draw(rows, [], tmp_path)
    assert [path.name for path in drawn] == ["speed-over-tokens.svg", "roofline.svg"]  # no rows of memory
    for path in drawn:
        words = {"".join(node.itertext()) for node in ElementTree.parse(path).iter() if node.tag.endswith("}text")}
        assert words & {"bf16 peak", "400 GFLOP/s"}
        assert "roofline" in path.name or words >= {"ours", "dense", "torchao", "oneDNN int8"}
    peaks = [
        {"op": "train_step", "machine": "m", "case": "a-model M4", "contender": name, "peak_bytes": 2e9}
        for name in ("ours", "bnb + PEFT")
    ]
    assert "Training step, a-model" in pictures.draw(peaks, [], tmp_path / "memory")[0].read_text()
    layers = [
        f"bert.encoder.layer.{block}.{kind}" for block in (0, 1) for kind in ("attention.self.key", "output.dense")
    ]
    ranks = {"claim": "adalora", "quick": False, "ranks": dict(zip(layers, (3, 5, 7, 11), strict=True))}
    (drawn_ranks,) = pictures.draw([], [ranks], tmp_path / "ranks")
    assert all(text in drawn_ranks.read_text() for text in ("11.0", "key", "output", "block"))
    before = [path.read_bytes() for path in drawn]
    assert [path.read_bytes() for path in pictures.draw(rows, [], tmp_path)] == before


def test_rows_of_two_machines_are_not_mixed():
    rows = list(read_rows(report.committed_files()[0]))[:40]
    other = [{**row, "machine": "another machine", "median_us": 1e9} for row in rows if "median_us" in row]
    merged = report.merge([*rows, *other])
    assert len(merged) == len(report.merge(rows)) + len(report.merge(other))
    text = report.report(merged)
    assert text.count("Machine: ") == 2
    assert text.startswith(report.report(report.merge(rows)))
