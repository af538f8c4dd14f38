"""Tables and pages with a generated part."""

from __future__ import annotations

import pytest

from bench.markdown import replace_marked, table


def test_columns_are_padded():
    assert table(["a", "long"], [["123", "4"]]) == "| a   | long |\n|-----|------|\n| 123 | 4    |"


def test_text_is_separated_from_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<begin>\nold\n<end>\nafter\n")
    replace_marked(page, "<begin>", "<end>", "| a |")
    assert page.read_text() == "before\n<begin>\n\n| a |\n\n<end>\nafter\n"
    replace_marked(page, "<begin>", "<end>", "| a |")
    assert page.read_text() == "before\n<begin>\n\n| a |\n\n<end>\nafter\n"


def test_page_without_marks_is_unchanged(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n<begin>\n")
    with pytest.raises(ValueError, match=r"must hold the lines '<begin>' and '<end>'"):
        replace_marked(page, "<begin>", "<end>", "new")
    assert page.read_text() == "text\n<begin>\n"
