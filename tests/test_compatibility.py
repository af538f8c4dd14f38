"""The bookkeeping of `make compat`, whose installations take an hour: bounds, failures and the page."""

from __future__ import annotations

import re
import sys
import zipfile

import pytest

pytest.importorskip("packaging")

from python.build_support import compatibility
from python.build_support.compatibility import Outcome, lower_bounds
from python.build_support.compatibility_page import page

METADATA = """Metadata-Version: 2.4
Name: qlora_kernels
Requires-Dist: torch>=2.10
Requires-Dist: transformers>=5.0; extra == "hf"
Requires-Dist: pytest; extra == "dev"
"""


@pytest.fixture(autouse=True)
def logs(monkeypatch, tmp_path):
    monkeypatch.setattr(compatibility, "OUT", tmp_path / "logs")
    return tmp_path / "logs"


def test_lower_bounds_are_those_of_the_wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("qlora_kernels-0.1.0.dist-info/METADATA", METADATA)
    assert lower_bounds(tmp_path / "a.whl") == {"torch": "2.10", "transformers": "5.0"}


def test_failed_check_reports_reason_and_keeps_output(logs):
    outcome = Outcome("row")
    code = "print('before'); print('1 failed, 2 passed in 3.00s'); raise SystemExit(1)"
    compatibility.check(outcome, "op tests", "row-ops", [sys.executable, "-c", code])
    assert outcome.checks == {"op tests": "fails: 1 failed, 2 passed in 3.00s"}
    assert "before" in (logs / "row-ops.log").read_text()


def test_passed_check_counts_tests():
    outcome = Outcome("row")
    compatibility.check(
        outcome, "op tests", "row-ops", [sys.executable, "-c", "print('7 passed, 1 skipped, 2 warnings in 3.00s')"]
    )
    assert outcome.checks == {"op tests": "7 passed, 1 skipped"}


def test_page_shows_results_and_missing_interpreters():
    outcomes = [
        Outcome("oldest", "3.10.13", {"torch": "2.10.0+cpu"}, {"wheel alone": "pass", "op tests": "fails: a | b"}),
        Outcome("Triton triton==3.6.0", "", {"triton": "3.6.0"}, {"gates broken": "0", "sm_100": "40", "sm_80": "40"}),
    ]
    text = page(outcomes, [14], {"torch": "2.10.0", "triton": "3.9.0", "transformers": ""})
    assert "| oldest | 3.10.13 | 2.10.0+cpu |  |  |  | pass |  | fails: a / b |  |" in text
    assert "| Triton | sm_80 | sm_100 | gates broken |" in text
    assert "| 3.6.0 | 40 | 40 | 0 |" in text
    assert "- CPython 3.14: no interpreter" in text
    assert "- triton 3.9.0: published" in text
    assert "- torch" not in text


def test_interpreter_runs():
    version = sys.version_info[:2]
    found = compatibility.interpreter(version)
    assert found is None or version == sys.version_info[:2]
    assert compatibility.interpreter((3, 99)) is None


def test_op_tests_import_only_what_the_checkout_holds(tmp_path):
    folders = {path.name for path in compatibility.copy_checkout(tmp_path).iterdir()}
    missing = {"bench", "tests", "python"} - folders
    imports = re.compile(rf"^(?:from|import) (?:{'|'.join(missing)})\b", re.MULTILINE)
    files = (tmp_path / compatibility.OP_TESTS[0]).rglob("*.py")
    assert not [file.name for file in files if imports.search(file.read_text(encoding="utf-8"))]
