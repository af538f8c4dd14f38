"""The API reference has an entry for every public name, and shows parameter descriptions as lists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import qlora_kernels as qk
from python.build_support.docstring_lists import with_lists

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"


PACKAGES = (
    "",
    "distributed",
    "integrations.transformers",
    "optim",
    "peft",
    "peft.linear_method",
    "peft.method",
    "training",
)
"""Modules below qlora_kernels whose `__all__` is public."""
NO_ENTRIES = {"__version__", "peft", "peft.METHODS"}
"""Names that are no function and no class: the version, a package, a table."""


def public_names(package: str) -> set[str]:
    """Return the names that a module exports, without those that a module above it exports as well."""
    module = pytest.importorskip(f"qlora_kernels.{package}".rstrip("."))
    above = set() if package == "" else set(qk.__all__)
    if package.startswith("peft."):
        above |= set(qk.peft.__all__)
    return {f"{package}.{name}".lstrip(".") for name in set(module.__all__) - above} - NO_ENTRIES


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package or "qlora_kernels")
def test_every_public_name_has_an_entry(package):
    entries = set(
        re.findall(r"^::: qlora_kernels\.([\w.]+)", "".join(p.read_text() for p in REFERENCE.glob("*.md")), re.M)
    )
    assert public_names(package) - entries == set()


@pytest.mark.parametrize("page", sorted(REFERENCE.glob("*.md")), ids=lambda page: page.stem)
def test_every_entry_exists_and_every_page_is_in_the_menu(page):
    for name in re.findall(r"^::: ([\w.]+)", page.read_text(), re.M):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    assert f"reference/{page.name}" in (REFERENCE.parents[1] / "mkdocs.yml").read_text()


def test_parameter_descriptions_become_lists():
    text = "One sentence.\n\na, b: first.   c: second\nline.\nRaises ValueError: never."
    assert with_lists(text, {"a", "b", "c"}) == (
        "One sentence.\n\n\n- **a, b**: first.\n- **c**: second\n  line.\n\nRaises ValueError: never."
    )


def test_docs_version_equals_installed_version():
    assert re.match(r"\d+\.\d+", qk.__version__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = qk.nothing
