"""Tables as aligned text, and as rich draws them on a terminal."""

from __future__ import annotations

import sys

import pytest

from qlora_kernels.cli.tables import table

ROWS = [("a [bold] name", "1.50"), ("b", "12.25")]
PLAIN = "name           value\na [bold] name   1.50\nb              12.25"


def test_columns_are_aligned():
    assert table(ROWS, ("name", "value"), right=(1,)) == PLAIN
    assert table([("a", "long value"), ("longer", "b")]) == "a       long value\nlonger  b"


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")


@pytest.mark.usefixtures("terminal")
def test_rich_draws_on_a_terminal():
    pytest.importorskip("rich")
    drawn = table(ROWS, ("name", "value"), right=(1,))
    assert "─" in drawn
    assert [line.split() for line in drawn.splitlines()[-2:]] == [["a", "[bold]", "name", "1.50"], ["b", "12.25"]]


@pytest.mark.usefixtures("terminal")
def test_without_rich_the_text_is_printed(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    assert table(ROWS, ("name", "value"), right=(1,)) == PLAIN
