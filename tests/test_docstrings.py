"""Public functions have docstrings of at least five words."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOPS = ("qlora_kernels", "bench", "python")
FEWEST_WORDS = 5

PENDING: dict[str, int] = {}
"""Folder -> permitted number of missing or short docstrings. A number may only be reduced."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Yield (name, node) of each public class, function and method, without nested functions and overloads."""
    waiting: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    while waiting:
        prefix, parent = waiting.pop()
        for node in parent.body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                yield f"{prefix}{node.name}", node
                if isinstance(node, ast.ClassDef):
                    waiting.append((f"{node.name}.", node))


def documented_methods() -> set[str]:
    """Return the names of methods that some class of the package documents; overrides inherit that text."""
    names = set()
    for path in (ROOT / "qlora_kernels").rglob("*.py"):
        for name, node in public_definitions(ast.parse(path.read_text(encoding="utf-8"))):
            if "." in name and ast.get_docstring(node):
                names.add(name.rpartition(".")[2])
    return names


def faults_of(source: str, inherited: set[str]) -> list[str]:
    """Return the public names of `source` whose docstring is missing or has too few words."""
    faults = []
    for name, node in public_definitions(ast.parse(source)):
        text = ast.get_docstring(node)
        if text is None:
            is_override = "." in name and name.rpartition(".")[2] in inherited
            faults += [] if is_override else [name]
        elif len(text.split()) < FEWEST_WORDS:
            faults.append(f"{name}: {text!r}")
    return faults


def test_short_or_missing_docstring_is_detected() -> None:
    source = (
        "def f(): pass\nclass A:\n  'The first letter of all.'\n  def g(self):\n    'At once.'\n  def h(self): pass"
    )
    assert faults_of(source, {"h"}) == ["f", "A.g: 'At once.'"]


def test_public_functions_are_documented() -> None:
    inherited, faults = documented_methods(), Counter[str]()
    found = []
    for top in TOPS:
        for path in sorted((ROOT / top).rglob("*.py")):
            names = faults_of(path.read_text(encoding="utf-8"), inherited)
            folder = "/".join(path.relative_to(ROOT).parts[: 2 if top == "qlora_kernels" else 1]).removesuffix(".py")
            faults[folder] += len(names)
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names]
    beyond = {folder: count for folder, count in faults.items() if count > PENDING.get(folder, 0)}
    listed = "\n".join(line for line in found if any(line.startswith(folder) for folder in beyond))
    assert not beyond, f"docstrings missing or shorter than {FEWEST_WORDS} words: {beyond}\n{listed}"
