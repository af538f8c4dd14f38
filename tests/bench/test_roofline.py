"""The page of predicted times equals what the model prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import roofline
from qlora_kernels.ops import extended_k

PAGE = Path(__file__).parents[2] / "docs" / "notebook" / "roofline.md"


def test_page_equals_the_output() -> None:
    assert PAGE.read_text(encoding="utf-8") == roofline.report(), "run python -m bench.roofline --update " + str(PAGE)


def test_update_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["roofline", "--update", str(page)])
    roofline.main()
    assert page.read_text(encoding="utf-8") == roofline.report()


@pytest.mark.parametrize("capability", extended_k.WIDEST)
def test_rule_of_extended_k_is_what_the_model_says(capability: int) -> None:
    assert extended_k.WIDEST[capability] == roofline.widest_extended_k(roofline.GPUS[capability])
