"""The same benchmarks under pytest-benchmark: `pytest bench/ops`, with warm weights and one implementation at a time.

`-k "linear_nf4 and ours"` selects some; `--benchmark-compare` and the plugin's other options apply. For comparisons,
use the interleaved figures with cold weights of bench/run.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.optional import complete, runs
from bench.registry import Case, Contender, Suite
from bench.run import build, fault_of
from bench.suites import suites

RUNS = [
    pytest.param(suite, case, contender, id=f"{case.op}-{case.name}-{contender.name}".replace(" ", "_"))
    for suite in suites().values()
    if complete(suite)
    for case in suite.cases("cpu")
    for contender in suite.contenders
    if case.quick and contender.threads is None and runs(contender, case)
]


@pytest.mark.parametrize(("suite", "case", "contender"), RUNS)
def test_op(suite: Suite, case: Case, contender: Contender, benchmark: Any) -> None:
    """Verify one implementation of one case, then time it."""
    inputs = suite.inputs(case)
    call = build(contender, case, inputs, copies=1)[0]
    fault = fault_of(suite, case, inputs, contender, call)
    assert fault is None, fault
    benchmark.group = f"{case.op} {case.name}"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
