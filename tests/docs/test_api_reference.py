"""The API reference has an entry for every public name, and shows parameter descriptions as lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qlora_kernels as qk
from python.build_support.docstring_lists import with_lists

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"


def test_every_public_name_has_an_entry():
    entries = set(
        re.findall(r"^::: qlora_kernels\.([\w.]+)", "".join(p.read_text() for p in REFERENCE.glob("*.md")), re.M)
    )
    names = {name for name in qk.__all__ if name not in ("peft", "__version__")}
    names |= {f"peft.{name}" for name in qk.peft.__all__ if name not in qk.__all__ and name != "METHODS"}
    assert names - entries == set()


def test_parameter_descriptions_become_lists():
    text = "One sentence.\n\na, b: first.   c: second\nline.\nRaises ValueError: never."
    assert with_lists(text, {"a", "b", "c"}) == (
        "One sentence.\n\n\n- **a, b**: first.\n- **c**: second\n  line.\n\nRaises ValueError: never."
    )


def test_docs_version_equals_installed_version():
    assert re.match(r"\d+\.\d+", qk.__version__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = qk.nothing
