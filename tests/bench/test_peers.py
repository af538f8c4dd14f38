"""Peers of the linear suites compute what they claim, a missing package is named, and the suites are complete."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import methods, optional, peers
from bench.gate import assert_quantizes
from bench.ops import bench_linear_nf4, bench_linear_nf4_grad_x, bench_linear_nf4_lora
from bench.registry import Case, Contender, Cost, Suite
from bench.run import build, fault_of
from bench.suites import GROUPS, suites
from qlora_kernels import peft

LINEAR = (bench_linear_nf4.SUITE, bench_linear_nf4_grad_x.SUITE, bench_linear_nf4_lora.SUITE)
OTHERS = ("Unsloth-style", "torchao", "torch int8", "oneDNN int8", "torch int4")

PEERS = [
    pytest.param(suite, contender, id=f"{suite.op}-{contender.name}")
    for suite in LINEAR
    for contender in suite.contenders
    if contender.name in OTHERS
]


def tiny(op: str) -> Case:
    return Case(op, M=16, N=128, K=256, r=4 if op.endswith("lora") else 0)


@pytest.mark.parametrize(("suite", "contender"), PEERS)
def test_peers_compute_a_linear_layer(suite, contender):
    for package in contender.packages:
        if optional.reason_missing(package):
            pytest.skip(f"{package} is not installed")
    case = tiny(suite.op)
    if contender.name == "oneDNN int8" and not peers.has_integer_products(case):
        pytest.skip("this processor has no integer products without saturation")
    inputs = suite.inputs(case)
    calls = build(contender, case, inputs, 2)
    assert [fault_of(suite, case, inputs, contender, call) for call in calls] == [None, None]


@pytest.mark.parametrize("name", ["torch int8", "oneDNN int8", "torch int4"])
def test_a_wrong_result_of_a_peer_is_a_fault(name):
    suite = bench_linear_nf4.SUITE
    (contender,) = [contender for contender in suite.contenders if contender.name == name]
    case = tiny(suite.op)
    if name == "oneDNN int8" and not peers.has_integer_products(case):
        pytest.skip("this processor has no integer products without saturation")
    inputs = suite.inputs(case)
    (call,) = build(contender, case, inputs, 1)
    assert "relative error" in fault_of(suite, case, inputs, contender, lambda: 1.1 * call())


def test_peer_weights_are_close_to_the_source():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    assert_quantizes(peers.Int8(weight).dequantize(), weight)
    with pytest.raises(AssertionError, match="weight: relative error"):
        assert_quantizes(2 * weight, weight)


def test_a_missing_package_is_named_with_its_contenders(monkeypatch):
    monkeypatch.setitem(optional.NAMES, "no_such_package", "no_such_package.part.function")
    never = Contender("theirs", lambda case, inputs, copies: [], lambda case: 1, packages=("no_such_package",))
    ours = Contender("ours", lambda case, inputs, copies: [], lambda case: 1)
    suite = Suite("op", lambda device: [], lambda case: Cost(1, 1), lambda case: None, (ours, never), lambda *_: None)
    assert list(optional.left_out([suite, suite])) == [
        "left out: theirs, because no_such_package cannot be used: it is not installed; pip install no_such_package"
    ]
    needy = dataclasses.replace(suite, contenders=(ours,), packages=("no_such_package",))
    assert next(optional.left_out([needy])).startswith("left out: suite op, because no_such_package cannot be used")
    assert (optional.complete(suite), optional.complete(needy)) == (True, False)
    assert not optional.runs(never, Case("op"))
    assert optional.runs(ours, Case("op"))


def test_package_with_import_error_is_skipped_with_reason(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('needs another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(optional.NAMES, "broken_package", "broken_package.function")
    assert optional.reason_missing("broken_package") == "RuntimeError: needs another torch"


def test_package_without_required_name_is_skipped(monkeypatch):
    monkeypatch.setitem(optional.NAMES, "json", "json.no_such_function")
    assert optional.reason_missing("json") == "AttributeError: module 'json' has no attribute 'no_such_function'"


def test_every_suite_is_in_one_group():
    grouped = [op for ops in GROUPS.values() for op in ops]
    assert sorted(grouped) == sorted(suites())


def test_every_method_over_nf4_is_measured():
    measured = {method.config for method in methods.METHODS.values()}
    assert measured == set(peft.METHODS) - {peft.FullFTConfig}
