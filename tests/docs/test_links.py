"""Links of all pages lead to files and headings that exist; rows of tables are complete; lists are lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HOST = re.compile(r"[a-z]+:", re.IGNORECASE)


def without_code(text: str) -> str:
    """Return a page without fenced blocks and inline code, in which brackets are not links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as Python-Markdown and GitHub form them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in words}


def broken(page: Path, text: str) -> list[str]:
    """Return the links of a page that lead to no file or no heading."""
    faults = []
    for target in LINK.findall(without_code(text)):
        if HOST.match(target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        known = to.exists() and (not anchor or to.suffix != ".md" or "reference" in to.parts or anchor in anchors(to))
        if not known:
            faults.append(target)
    return faults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text()) == []


def broken_rows(text: str) -> list[str]:
    """Return the lines of tables that are no complete row: a row ends with its line."""
    tables = re.findall(r"^\|.*\n\|[-|: ]+\|\n(?:.+\n?)*", without_code(text), flags=re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()]
    return [line for line in lines if not (line.startswith("|") and line.rstrip().endswith("|"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_rows_of_tables_are_complete(page):
    assert broken_rows(page.read_text()) == []


def test_a_row_on_two_lines_is_found():
    assert broken_rows("| a | b |\n|---|---|\n| 1 | two\nlines |\n\ntext\n") == ["| 1 | two", "lines |"]


def glued_lists(text: str) -> list[str]:
    """Return the first items of lists that follow a paragraph without an empty line, which the site would not show."""
    found = re.findall(r"^(?![-*#|>\s]|\d+\. ).*\n((?:[-*]|\d+\.) .*)$", without_code(f"\n{text}"), flags=re.MULTILINE)
    inside = re.findall(r"^(?:[-*]|\d+\.) .*(?:\n(?!\n).*)*", without_code(text), flags=re.MULTILINE)
    return [item for item in found if not any(item in block.splitlines()[1:] for block in inside)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lists_begin_after_an_empty_line(page):
    assert glued_lists(page.read_text()) == []


def test_a_list_that_is_glued_to_a_paragraph_is_found():
    assert glued_lists("Gates:\n- one\n- two\n") == ["- one"]
    assert glued_lists("## Heading\n- one\n- two\n  more\n- three\n\ntext\n\n1. four\n") == []


def test_every_page_is_in_the_menu_of_the_site():
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.parent != ROOT]
    assert [page for page in pages if f": {page}" not in menu and f"- {page}" not in menu] == []


def test_a_broken_link_is_found():
    page = ROOT / "README.md"
    text = "[a](docs/index.md) [b](docs/nothing.md) [c](docs/index.md#install) [d](docs/index.md#nothing) `[e](x)`"
    assert broken(page, text) == ["docs/nothing.md", "docs/index.md#nothing"]
    assert broken(page, "[web](https://example.org/x) ![picture](docs/assets/no.svg)") == ["docs/assets/no.svg"]
