"""Faults planted in C++ and CUDA sources, all in one compilation: a number selects the active one at run time."""

from __future__ import annotations

NONE = 0
"""The number of no fault."""

VARIABLE = "planted_fault"
"""The int of the compiled library that holds the number."""


def with_fault(source: str, name: str, right: str, wrong: str, number: int) -> str:
    """Return `source` with a wrong text in place of a right one while VARIABLE equals `number`.

    right, wrong: two expressions of one type, or two statements; statements end with ";", after which the right one may
    have a comment.   name: of the source.
    Raises AssertionError if `right` does not occur exactly once.
    """
    count = source.count(right)
    assert count == 1, f"{name} must contain {right!r} once, got {count}: bring the planted fault up to date"
    code, mark, comment = right.partition("  //")
    if code.endswith(";"):
        changed = f"if ({VARIABLE} == {number}) {{ {wrong} }} else {{ {code} }}{mark}{comment}"
    else:
        changed = f"({VARIABLE} == {number} ? ({wrong}) : ({right}))"
    return source.replace(right, changed)
