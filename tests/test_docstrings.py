"""Public functions have docstrings of at least five words, which say what the functions raise."""

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


# What a function raises


def raises(function: Definition) -> bool:
    """Whether a function raises an error of its own: neither the error that it handles, nor that of an abstract one."""
    errors = [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc is not None]
    return any(not (isinstance(error, ast.Name) and error.id == "NotImplementedError") for error in errors)


def silent_about_errors(source: str, inherited: set[str]) -> list[str]:
    """Return the public functions and classes of `source` that raise errors which their docstrings do not mention.

    inherited: methods of a base class that says what they raise; an override without a docstring inherits it.
    """
    faults = []
    for name, node in public_definitions(ast.parse(source)):
        constructors = [part for part in node.body if getattr(part, "name", "") in ("__init__", "__post_init__")]
        own = constructors if isinstance(node, ast.ClassDef) else [node]
        text = ast.get_docstring(node)
        if not any(map(raises, own)) or any("aise" in (ast.get_docstring(part) or "") for part in (node, *own)):
            continue
        if text is not None or name.rpartition(".")[2] not in inherited:
            faults.append(name)
    return faults


def test_unmentioned_error_is_detected() -> None:
    source = """
class A:
    '''A class of the test.'''
    def __init__(self): raise ValueError("x")
    def f(self): raise ValueError("x")
    def g(self):
        '''Override what another class documents.'''
        raise TypeError
    def abstract(self):
        '''Return what subclasses compute.'''
        raise NotImplementedError
def h():
    '''Handle an error and pass it on.'''
    try: pass
    except ValueError: raise
"""
    assert silent_about_errors(source, {"f"}) == ["A", "A.g"]


def test_docstrings_mention_errors() -> None:
    paths = [path for top in ("qlora_kernels", "bench") for path in sorted((ROOT / top).rglob("*.py"))]
    sources = {path: path.read_text(encoding="utf-8") for path in paths}
    inherited = {
        name.rpartition(".")[2]
        for source in sources.values()
        for name, node in public_definitions(ast.parse(source))
        if "." in name and "aise" in (ast.get_docstring(node) or "")
    }
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, source in sources.items()
        for name in silent_about_errors(source, inherited)
    ]
    assert not found, "say in the docstring what is raised (Raises ValueError ...):\n" + "\n".join(found)
