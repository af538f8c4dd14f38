"""Every op has a benchmark, and a wrong result is not timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.peaks import Peak
from bench.registry import Case, Contender, Cost, Suite
from bench.run import run_case
from bench.suites import suites
from bench.timing import Budget
from qlora_kernels.ops.registry import kernels_of

MEASURED_WITH_ANOTHER = {
    "quantize_absmax": "quantize_nf4",
    "linear_nf4_lora_backward": "linear_nf4_lora",
    "attention_backward": "attention",
    **dict.fromkeys(("rms_norm", "rms_norm_backward", "rope", "glu", "glu_backward"), "model_parts"),
}
"""Ops that are measured in another op's benchmark."""

NOT_MEASURED = {
    "linear_nf4_multi_lora",
    "linear_nf4_multi_lora_backward",
    "linear_nf4_lora_group",
    "linear_nf4_lora_group_backward",
    "linear_nf4_lora_merged",
    "linear_nf4_lora_merged_backward",
}
"""Ops without a peer: no other library runs a batch with many adapters, several linears on one x, or an
update that is added to a quantized weight in each call, on a CPU."""

PEAKS = {name: Peak(name, 1e9, "given") for name in ("read", "copy", "bf16", "fma")}


def test_every_op_has_a_benchmark():
    ops = set(kernels_of("reference")) - set(MEASURED_WITH_ANOTHER) - NOT_MEASURED
    assert ops <= set(suites())


@pytest.mark.parametrize("suite", suites().values(), ids=lambda suite: suite.op)
def test_suites_are_well_formed(suite):
    cases = list(suite.cases("cpu"))
    assert {case.op for case in cases} == {suite.op}
    assert len({case.name for case in cases}) == len(cases)
    assert any(case.quick for case in cases)
    assert suite.contenders[0].name == "ours"
    assert all(suite.cost(case).bytes + suite.cost(case).flops > 0 for case in cases)
    assert all(case.device == "cuda" and case.isa is None for case in suite.cases("cuda"))


def twice(case, inputs, copies):
    return [lambda: 2 * inputs] * copies


def verify_doubled(case, inputs, contender, result):
    assert torch.equal(result, inputs + inputs), "not doubled"


SUITE = Suite(
    op="twice",
    cases=lambda device: [Case("twice", N=4)],
    cost=lambda case: Cost(32, 4),
    inputs=lambda case: torch.ones(4),
    contenders=(Contender("ours", twice, lambda case: 16),),
    verify=verify_doubled,
)


def test_a_right_result_is_timed_cold_and_warm():
    rows = list(run_case(SUITE, Case("twice", N=4), PEAKS, Budget(rounds=1, samples=1, seconds=0.0)))
    assert [row["mode"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert row["gate"] == "green"
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["roofline"] == max(row["fraction"].values())


def test_wrong_result_is_not_timed():
    wrong = Contender("wrong", lambda case, inputs, copies: [lambda: inputs] * copies, lambda case: 16)
    suite = dataclasses.replace(SUITE, contenders=(*SUITE.contenders, wrong))
    rows = list(run_case(suite, Case("twice", N=4), PEAKS, Budget(rounds=1, samples=1, seconds=0.0)))
    red = [row for row in rows if row["contender"] == "wrong"]
    assert [row["gate"] for row in red] == ["red: not doubled"]
    assert not any("median_us" in row for row in red)
    assert all("wrong" not in row["speedup"] for row in rows if row["gate"] == "green")


def test_a_contender_that_fails_is_named_and_the_others_are_timed():
    def fails(case, inputs, copies):
        raise RuntimeError("no kernel for this machine\nand more words")

    suite = dataclasses.replace(SUITE, contenders=(*SUITE.contenders, Contender("failing", fails, lambda case: 16)))
    rows = list(run_case(suite, Case("twice", N=4), PEAKS, Budget(rounds=1, samples=1, seconds=0.0)))
    assert [row["gate"] for row in rows if row["contender"] == "failing"] == [
        "red: RuntimeError: no kernel for this machine"
    ]
    assert [row["contender"] for row in rows if "median_us" in row] == ["ours", "ours"]
