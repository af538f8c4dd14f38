"""Converts parameter descriptions in docstrings to Markdown lists, for the API reference.

The project's docstrings describe one or several parameters by `name: text` at the beginning of a line or after three
spaces. Markdown would join such lines to one paragraph.
"""

from __future__ import annotations

import re

_NAMES = re.compile(r"(?:^|(?<=\s{3}))(\*{0,2}\w+(?:, \*{0,2}\w+)*): ")


def with_lists(text: str, names: set[str]) -> str:
    """Return `text` with every description of one of `names` as an item of a list."""
    lines: list[str] = []
    in_item = False
    for line in text.splitlines():
        parts = _items(line, names)
        if parts:
            if not in_item:
                lines.append("")
            lines += parts
            in_item = True
        elif in_item and line.strip() and not (lines[-1].endswith(".") and line[0].isupper()):
            lines.append("  " + line)  # continues the item above
        else:
            lines += [""] if in_item else []
            in_item = False
            lines.append(line)
    return "\n".join(lines)


def _items(line: str, names: set[str]) -> list[str]:
    starts = [match for match in _NAMES.finditer(line) if {name.strip("* ") for name in match[1].split(",")} <= names]
    if not starts or starts[0].start() != 0:
        return []
    ends = [*(match.start() for match in starts[1:]), len(line)]
    return [f"- **{match[1]}**: {line[match.end() : end].strip()}" for match, end in zip(starts, ends, strict=True)]
