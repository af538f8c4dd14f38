"""Counts of the source tree that a reader's review of the code compares: `python -m python.review.counts [ROOT]`.

Prints one line for each count, of the tracked files below ROOT (default: this repository). docs/notebook/code-review.md
lists the results at two commits.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TOPS = ("qlora_kernels", "bench", "python")
"""Folders of shipped and supporting Python code."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def tracked(root: Path) -> list[Path]:
    """Return the tracked files below `root` that exist."""
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    return [root / line for line in listed.stdout.splitlines() if (root / line).is_file()]


def lines_of(paths: list[Path]) -> int:
    """Return the number of lines of text files."""
    return sum(path.read_text(encoding="utf-8", errors="replace").count("\n") for path in paths)


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Yield public functions, and public methods of public classes."""
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        for function in inner:
            if isinstance(function, Function) and not function.name.startswith("_"):
                yield function


def counts(root: Path) -> dict[str, int]:
    """Return the counts by name, in the order of the page."""
    files = tracked(root)
    below = {top: [p for p in files if p.relative_to(root).parts[0] == top] for top in (*TOPS, "tests", "csrc", "docs")}
    python = {top: [path for path in paths if path.suffix == ".py"] for top, paths in below.items()}
    pages = [path for path in below["docs"] if path.suffix == ".md"] + [root / "README.md"]
    result = {
        "lines of qlora_kernels": lines_of(python["qlora_kernels"]),
        "lines of csrc": lines_of(below["csrc"]),
        "lines of tests": lines_of(python["tests"]),
        "lines of bench": lines_of(python["bench"]),
        "lines of python": lines_of(python["python"]),
        "lines of docs and README": lines_of(pages),
    }
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for top in TOPS for path in python[top]}
    functions = [function for tree in trees.values() for function in public_functions(tree)]
    texts = [text for function in functions if (text := ast.get_docstring(function))]
    result["test functions"] = sum(
        isinstance(node, Function) and node.name.startswith("test_")
        for path in python["tests"]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
    result["public functions"] = len(functions)
    result["public functions without docstring"] = len(functions) - len(texts)
    result["docstrings of four words or fewer"] = sum(len(text.split()) <= 4 for text in texts)
    result["public functions with a raise and no 'Raises'"] = sum(
        any(isinstance(node, ast.Raise) for node in ast.walk(function))
        and "aise" not in (ast.get_docstring(function) or "")
        for function in functions
    )
    sources = {path: path.read_text(encoding="utf-8") for top in TOPS for path in python[top]}
    package = [text for path, text in sources.items() if path.relative_to(root).parts[0] == "qlora_kernels"]
    for name, pattern in (
        ("noqa", r"# noqa"),
        ("type: ignore", r"# type: ignore"),
        ("fmt: skip", r"# fmt: skip"),
        ("lines with Any", r".*\bAny\b.*"),
        ("cache decorators", r"^\s*@(?:functools\.)?(?:lru_)?cache\b"),
    ):
        result[name] = sum(len(re.findall(pattern, text, re.MULTILINE)) for text in sources.values())
    result["package files with a source"] = sum("Source:" in text or "Sources:" in text for text in package)
    result["package files"] = len(package)
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for node in nodes if isinstance(node, Function)]
    classes = [(node.end_lineno or 0) - node.lineno + 1 for node in nodes if isinstance(node, ast.ClassDef)]
    result["longest function"] = max(lengths)
    result["functions over 80 lines"] = sum(length > 80 for length in lengths)
    result["longest package file"] = max(text.count("\n") for text in package)
    result["longest class"] = max(classes)
    result["parameters of the longest C++ declaration"] = max(
        (declared.count(",") + 1 for path in below["csrc"] for declared in declarations(path)), default=0
    )
    result["largest tracked file, bytes"] = max(path.stat().st_size for path in files)
    return result


def declarations(path: Path) -> list[str]:
    """Return the parameter lists of launchers and kernel functions declared in a C++ header."""
    if path.suffix != ".h":
        return []
    return re.findall(r"\b(?:launch_\w+|linear_\w+)\(([^()]*)\);", path.read_text(encoding="utf-8"))


def main() -> None:
    """Print the counts of a tree."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2]
    for name, value in counts(root.resolve()).items():
        print(f"{name}: {value:,}")


if __name__ == "__main__":
    main()
